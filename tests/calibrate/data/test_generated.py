"""Windows of what a model said: prompts do not count, and what was cut off is not closed."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prune_export.calibrate import Sample, Tokenizer, read_samples, tokens_of_samples, write_samples
from prune_export.calibrate.data.generated import documents_of
from prune_export.errors import CheckpointError, StageError
from prune_export.recipe import Generated

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def talking(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer, with a chat template."""
    folder = tmp_path_factory.mktemp("talking")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def source(length: int, samples: int | None = None, **keys: object) -> Generated:
    return Generated.model_validate(
        {"generated": {"answers": 9}, "length": length, "samples": samples, "packing": "stream"}
        | keys
    )


def said(directory: Path, sample: Sample) -> tuple[str, str]:
    """The text of a sample's document, and of what counts of it."""
    tokenizer = Tokenizer.load(directory)
    (one,) = documents_of([sample], tokenizer)
    assert one.counted is not None
    decode = tokenizer.backend.decode
    return decode(one.ids), decode(one.ids[one.counted])


ASKED = [{"role": "user", "content": "Why?"}]


def test_only_the_answer_counts(talking: Path) -> None:
    whole, counted = said(talking, Sample(0, 0, "Because.", True, messages=ASKED))
    assert whole == "[user]Why?[end]\n[assistant]Because.[end]\n"
    assert counted == "Because.[end]\n"


def test_of_a_longer_conversation_only_the_last_answer_does(talking: Path) -> None:
    before = [*ASKED, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    whole, counted = said(talking, Sample(0, 0, "So too.", True, messages=before))
    assert whole.count("So") == 2
    assert counted == "So too.[end]\n"


def test_a_cut_answer_does_not_teach_how_to_end(talking: Path) -> None:
    whole, counted = said(talking, Sample(0, 0, "Because of", False, messages=ASKED))
    assert whole.endswith("Because of[end]\n")
    assert counted == "Because of"


def test_text_that_is_gone_on_with(talking: Path) -> None:
    whole, counted = said(talking, Sample(0, 0, " a time", True, text="Once upon"))
    assert (whole, counted) == ("Once upon a time</s>", " a time</s>")
    whole, counted = said(talking, Sample(0, 0, " a time", False, text="Once upon"))
    assert (whole, counted) == ("Once upon a time</s>", " a time")


def test_ids_are_taken_as_they_were_drawn(talking: Path) -> None:
    backend = Tokenizer.load(talking).backend
    ids = backend("abcd")["input_ids"]
    whole, counted = said(talking, Sample(0, 0, "x", True, ids=[*ids, 1], given=2))
    assert (whole, counted) == ("abcd</s>", "cd</s>")


def test_windows_count_what_was_said(talking: Path) -> None:
    samples = [Sample(n, 0, f"Answer {n}.", True, messages=ASKED) for n in range(6)]
    made = tokens_of_samples(source(24, 5), samples, talking, origin={"generated": {"from": "me"}})
    assert made.counted is not None
    assert made.counted.shape == (5, 24)
    assert 0 < int(made.counted.sum()) < 5 * 24
    assert made.provenance["generated"] == {"from": "me"}
    assert len(made.documents) > 2
    everything = tokens_of_samples(source(24, 5, loss_on="all"), samples, talking, origin={})
    assert everything.counted is None
    assert everything.provenance["windows_available"] > made.provenance["windows_available"]
    shuffled = tokens_of_samples(source(24, 5, packing="packed"), samples, talking, origin={})
    assert {tuple(row) for row in shuffled.ids.tolist()} <= {
        tuple(row)
        for row in tokens_of_samples(source(24), samples, talking, origin={}).ids.tolist()
    }


def test_too_few_answers_are_told_with_what_to_do(talking: Path) -> None:
    samples = [Sample(0, 0, "Yes.", True, messages=ASKED), Sample(1, 0, " ", True, messages=ASKED)]
    with pytest.raises(StageError, match=r"2 answers \(1 of them empty\) give 0 windows"):
        tokens_of_samples(source(24, 5), samples, talking, origin={})


def test_samples_that_other_data_use_are_left_out(talking: Path) -> None:
    samples = [Sample(n, 0, f"Answer {n}.", True, messages=ASKED) for n in range(6)]
    made = tokens_of_samples(
        source(24), samples, talking, origin={}, exclude=frozenset({samples[0].hash})
    )
    assert samples[0].hash not in made.documents
    assert samples[1].hash in made.documents


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = [
        Sample(1, 0, "Ä", True, messages=ASKED, about={"model": "m"}),
        Sample(0, 1, "", False, text="t", document="d"),
        Sample(0, 0, "z", False, ids=[1, 2], given=1),
    ]
    write_samples(tmp_path / "a.jsonl", samples)
    assert read_samples(tmp_path / "a.jsonl") == [samples[2], samples[0], samples[1]]
    (tmp_path / "b.jsonl").write_text('{"prompt": 0}\n')
    with pytest.raises(CheckpointError, match="is no answer"):
        read_samples(tmp_path / "b.jsonl")
