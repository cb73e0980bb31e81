"""Conversations become windows through the chat template, and say which tokens are learnt."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prune_export.calibrate import TokenSet, token_set
from prune_export.calibrate.data.conversations import Conversation
from prune_export.calibrate.data.tokenizer import Tokenizer as Ours
from prune_export.errors import PlanError
from prune_export.recipe import HubDataset, LocalText, TokenFile
from prune_export.system import bounded

PLAIN = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} </s>{% endgeneration %}\n"
    "{% else %}{{ m.content }} </s>\n{% endif %}{% endfor %}"
)
STRICT = (
    "{{ bos_token }} {% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant may speak') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
ENDLESS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd") + "{% endfor %}" * 4
FORGETFUL = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>", "<system>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(100)]


def saved(path: Path, template: Any, *, bos: bool = False) -> Path:
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        built.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = template
    made.save_pretrained(path)
    return path


def talk(*said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": one} for i, one in enumerate(said)]


def written(root: Path, *rows: Any, name: str = "a.jsonl") -> LocalText:
    lines = "\n".join(json.dumps({"messages": row}) for row in rows)
    (root / name).write_text(lines, encoding="utf-8")
    return source(name)


def source(*names: str, **keys: Any) -> LocalText:
    return LocalText(files=names, column="messages", **{"length": 8, "packing": "stream", **keys})


def words(directory: Path, ids: Any) -> list[str]:
    backend = PreTrainedTokenizerFast.from_pretrained(directory)
    return [str(one) for one in backend.convert_ids_to_tokens(list(ids))]


TWO = (talk("w1 w2", "w3", "w4", "w5 w6"), talk("w7", "w8"))
SPOKEN = (
    "<user> w1 w2 </s> <assistant> w3 </s> <user> w4 </s> <assistant> w5 w6 </s> "
    "<user> w7 </s> <assistant> w8 </s>"
)


def test_the_chat_template_writes_them(tmp_path: Path) -> None:
    """In order, the template's own ends of turns between them, no text's end besides."""
    tokenizer = saved(tmp_path / "t", PLAIN)
    found = token_set(written(tmp_path, *TWO), tokenizer, tmp_path)
    assert found.ids.shape == (2, 8)
    assert words(tokenizer, found.ids.flatten()) == SPOKEN.split()[:16]
    assert found.counted is None
    assert found.provenance["loss_on"] == "all"
    assert len(found.documents) == 2
    other = saved(tmp_path / "u", PLAIN.replace("</s>", "</s> </s>"))
    assert token_set(source("a.jsonl"), other, tmp_path).fingerprint != found.fingerprint


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_the_assistant_says_is_marked(tmp_path: Path, template: str) -> None:
    """By the template's own marks, or by what it writes of fewer messages."""
    tokenizer = saved(tmp_path / "t", template)
    asked = written(tmp_path, *TWO).model_copy(update={"loss_on": "assistant"})
    found = token_set(asked, tokenizer, tmp_path)
    assert found.counted is not None
    marked = found.ids.flatten()[found.counted.flatten()]
    assert words(tokenizer, marked) == ["w3", "</s>", "w5", "w6", "</s>"]
    everything = token_set(source("a.jsonl"), tokenizer, tmp_path)
    assert torch.equal(everything.ids, found.ids)
    assert everything.fingerprint != found.fingerprint


@pytest.mark.parametrize("packing", ["packed", "windows", "stream"])
def test_windows_in_which_nobody_answers_are_left_out(tmp_path: Path, packing: str) -> None:
    tokenizer = saved(tmp_path / "t", PLAIN)
    long = " ".join(f"w{i}" for i in range(40))
    rows = [talk(long, "w50 w51"), *[talk(long)] * 5]
    asked = written(tmp_path, *rows).model_copy(
        update={"loss_on": "assistant", "packing": packing, "seed": 3}
    )
    if packing == "windows":
        with pytest.raises(PlanError, match="holds 0 windows"):
            token_set(asked.model_copy(update={"seed": 1}), tokenizer, tmp_path)
        return
    found = token_set(asked, tokenizer, tmp_path)
    assert found.samples == 1
    assert found.counted is not None
    said = words(tokenizer, found.ids.flatten()[found.counted.flatten()])
    assert said == ["w50", "w51", "</s>"]
    assert len(found.documents) <= 2


def test_a_window_begins_with_the_prefix_once(tmp_path: Path) -> None:
    """The template's own BOS is not put behind that of the window."""
    tokenizer = saved(tmp_path / "t", STRICT, bos=True)
    asked = written(tmp_path, *TWO).model_copy(update={"loss_on": "assistant", "length": 7})
    found = token_set(asked, tokenizer, tmp_path)
    said = "<user> w1 w2 <assistant> w3 <user> w4 <assistant> w5 w6 <user> w7 <assistant> w8"
    assert (found.ids[:, 0] == 1).all()
    assert words(tokenizer, found.ids[:, 1:].flatten()) == said.split()[:12]
    assert found.counted is not None
    assert not found.counted[:, 0].any()
    assert words(tokenizer, found.ids[found.counted]) == ["w3", "w5", "w6"]


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    """Its structs have null where a message lacks a key that another has."""
    import pyarrow as pa
    from pyarrow import parquet

    tokenizer = saved(tmp_path / "t", PLAIN + "{% if messages[0].name is defined %}w99{% endif %}")
    rows = [[dict(one) for one in row] for row in TWO]
    rows[1][0]["name"] = None  # type: ignore[assignment]
    rows[1][1]["name"] = "w98"
    rows[1][1]["when"] = datetime(2026, 12, 1)  # type: ignore[assignment]
    same = json.loads(json.dumps(rows, default=str))
    expected = token_set(written(tmp_path, *same), tokenizer, tmp_path)
    parquet.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
    found = token_set(source("a.parquet"), tokenizer, tmp_path)
    assert torch.equal(found.ids, expected.ids)
    assert found.documents == expected.documents


def test_excluded_conversations_are_left_out(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "t", PLAIN)
    asked = written(tmp_path, *TWO)
    first = Conversation(tuple(TWO[0]), "").hash
    found = token_set(
        asked.model_copy(update={"length": 4}), tokenizer, tmp_path, exclude=frozenset({first})
    )
    assert words(tokenizer, found.ids.flatten())[:2] == ["<user>", "w7"]
    assert found.provenance["documents_excluded"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "has no message in `messages`"),
        (["w1"], "message 0 of `messages` is text, expected role and content"),
        ([{"role": "user"}], "`content` of message 0 of `messages` is missing, expected text"),
        ([*talk("w1"), {"role": 3, "content": "w1"}], "`role` of message 1 .* is a number"),
        ([{"role": "user", "content": None}], "`content` of message 0 .* is null"),
        ([{"role": "user", "content": [{"type": "image"}]}], "`content` .* is a list"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        ([{"role": "\ud800", "content": "w1"}], "half of a surrogate pair"),
        ([{"role": "user", "content": "w1", "x": {"\ud800": 1}}], "half of a surrogate pair"),
        (None, "`messages` is null, expected text"),
        ({"role": "user"}, "`messages` is an object, expected text"),
    ],
)
def test_malformed_messages_are_named_by_line(tmp_path: Path, row: Any, message: str) -> None:
    tokenizer = saved(tmp_path / "t", PLAIN)
    asked = written(tmp_path, TWO[0], row)
    with pytest.raises(PlanError, match=rf"data files  a\.jsonl:2\n  .*{message}"):
        token_set(asked, tokenizer, tmp_path)


def test_what_a_template_cannot_do_is_said(tmp_path: Path) -> None:
    asked = written(tmp_path, TWO[0], [*talk("w1", "w2")[:1], {"role": "tool", "content": "w3"}])

    def refusal(template: Any, loss_on: str = "all") -> str:
        tokenizer = saved(tmp_path / f"t{len(list(tmp_path.iterdir()))}", template)
        with pytest.raises(PlanError) as refused:
            token_set(asked.model_copy(update={"loss_on": loss_on}), tokenizer, tmp_path)
        return str(refused.value)

    assert "the model's tokenizer has no chat template\n  add one" in refusal(None)
    said = refusal(STRICT)
    assert "a.jsonl:2\n  the chat template refuses these messages: Only user and assist" in said
    assert "does not tell which tokens the assistant says" in refusal(FORGETFUL, "assistant")
    assert "none is the default" in refusal({"tools": PLAIN, "rag": PLAIN})


def test_code_in_a_template_is_not_run(tmp_path: Path) -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = saved(tmp_path / "t", attack)
    with pytest.raises(PlanError, match=r"refuses these messages.*unsafe"):
        token_set(written(tmp_path, *TWO), tokenizer, tmp_path)


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_a_template_that_does_not_end_is_stopped(
    loss_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loop is as long as the sandbox lets it be, and they lie in one another."""
    monkeypatch.setattr(bounded, "SECONDS", 0.1)
    for template in (ENDLESS, ENDLESS + MARKED):
        model = saved(tmp_path / "model", template)
        asked = written(tmp_path, talk("w1", "w2")).model_copy(update={"loss_on": loss_on})
        with pytest.raises(PlanError, match="did not end within"):
            token_set(asked, model, tmp_path)


def test_text_and_conversations_are_not_mixed(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "t", PLAIN)
    with pytest.raises(PlanError, match="is text, and the ones before it are conversations"):
        token_set(written(tmp_path, TWO[0], "w1 w2"), tokenizer, tmp_path)
    with pytest.raises(PlanError, match=r"a\.jsonl:2\n  is a conversation, and the ones before"):
        token_set(written(tmp_path, "w1 w2", TWO[0]), tokenizer, tmp_path)
    (tmp_path / "b.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9")
    with pytest.raises(PlanError, match="holds text, and `loss_on: assistant` is for conv"):
        token_set(source("b.txt", loss_on="assistant"), tokenizer, tmp_path)


def test_marks_are_saved_with_the_tokens(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "t", PLAIN)
    asked = written(tmp_path, *TWO).model_copy(update={"loss_on": "assistant"})
    made = token_set(asked, tokenizer, tmp_path)
    assert made.counted is not None
    for name in ("a", "b"):
        made.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = token_set(TokenFile(tokens="a.safetensors", length=8), tokenizer, tmp_path)
    assert found.counted is not None
    assert torch.equal(found.counted, made.counted)
    assert found.fingerprint == made.fingerprint
    assert TokenSet.of(made.ids, made.documents, made.provenance).fingerprint != made.fingerprint
    cut = token_set(TokenFile(tokens="a.safetensors", length=7), tokenizer, tmp_path)
    assert cut.counted is not None
    assert torch.equal(cut.counted, made.counted[:, :7])
    with pytest.raises(PlanError, match="windows in whose first 3 tokens the assistant says noth"):
        token_set(TokenFile(tokens="a.safetensors", length=3), tokenizer, tmp_path)


def test_an_added_token_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "t", PLAIN)
    backend = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    size = len(backend)
    backend.add_tokens(["<new>"])
    backend.save_pretrained(tokenizer)
    (tmp_path / "a.txt").write_text("w1 w2 <new> " * 8)
    asked = LocalText(files=("a.txt",), length=8, packing="packed")
    assert token_set(asked, tokenizer, tmp_path, vocabulary=size + 1).samples
    with pytest.raises(PlanError) as refused:
        token_set(asked, tokenizer, tmp_path, vocabulary=size)
    said = str(refused.value)
    assert f"the token '<new>' with id {size}, but the model's embedding has only {size}" in said
    assert "resize_token_embeddings" in said
    assert Ours.load(tokenizer).prefix == ()


def test_a_dataset_of_the_hub_goes_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows as `datasets` streams them; only the Hub itself is left out."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"messages": row} for row in TWO]).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: rows)
    monkeypatch.setattr("prune_export.calibrate.data.sources.hub_revision", lambda source: "0" * 40)
    tokenizer = saved(tmp_path / "t", PLAIN)
    keys: dict[str, Any] = {"column": "messages", "packing": "stream", "length": 8}
    asked = HubDataset(dataset="a/b", loss_on="assistant", **keys)
    found = token_set(asked, tokenizer, tmp_path)
    local = token_set(written(tmp_path, *TWO), tokenizer, tmp_path)
    assert torch.equal(found.ids, local.ids)
    assert found.documents == local.documents
    assert found.counted is not None
    rows = datasets.Dataset.from_list([{"messages": "w1"}, {"messages": None}])
    with pytest.raises(PlanError, match="data  a/b  row 1\n  `messages` is null, expected text"):
        token_set(HubDataset(dataset="a/b", **keys), tokenizer, tmp_path)
