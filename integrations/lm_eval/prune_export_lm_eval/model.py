"""The engine as lm-eval's `LM`: log likelihoods, rolling ones, and generation, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from prune_export_server.generation import Generator, Sampling
from prune_export_server.text import Detokenizer, Stopper

from prune_export import Machine, engines
from prune_export.errors import PlanError, did_you_mean
from prune_export.plugins import load_config, load_ends, load_tokenizer

NAME = "prune-export"
"""Under which lm-eval knows it: `--model prune-export --model_args directory=out/,engine=onnx`."""

_DEFAULT_LONGEST = 2048
_MOST_NEW = 256


class EngineLM(TemplateLM):  # type: ignore[misc]
    """An engine of a result directory, a checkpoint in PyTorch, or an exported engine."""

    def __init__(
        self,
        directory: str,
        engine: str = "pytorch",
        max_length: int | None = None,
        max_gen_toks: int = _MOST_NEW,
        trust_engine: bool = False,
        **unused: Any,
    ) -> None:
        del unused  # lm-eval passes a device and a batch size to every model
        super().__init__()
        place = Path(directory)
        held = engines(place, trust=trust_engine)
        if engine not in held:
            raise PlanError(
                f"--engine {engine}", f"{directory} does not hold it", did_you_mean(engine, held)
            )
        self._open(held[engine], place, Machine.detect(), max_length, max_gen_toks)

    @classmethod
    def of(cls, engine: Any, machine: Machine) -> EngineLM:
        """As what `engines` found, whose config and tokenizer lie beside it."""
        made = cls.__new__(cls)
        TemplateLM.__init__(made)
        made._open(engine, engine.path, machine, None, _MOST_NEW)
        return made

    def _open(
        self,
        engine: Any,
        place: Path,
        machine: Machine,
        max_length: int | None,
        max_gen_toks: int,
    ) -> None:
        config = load_config(place).get_text_config()
        limits = [max_length, engine.longest, getattr(config, "max_position_embeddings", 0)]
        self.max_length = min([one for one in limits if one] or [_DEFAULT_LONGEST])
        self.max_gen_toks = max_gen_toks
        self.batch_size = 1
        self.tokenizer = load_tokenizer(place)
        ends = sorted({*load_ends(place), self.tokenizer.eos_token_id} - {None})
        self._end = ends[0] if ends else 0
        self._generator = Generator(engine.open(machine), ends, self.max_length)

    def close(self) -> None:
        """Frees the engine."""
        self._generator.close()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self._end if begin is None else int(begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text, as lm-eval's own model of transformers makes them.

        Unless it is said, the tokenizer adds what it always adds, but no second first token.
        """
        begin = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and string.startswith(begin):
            add_special_tokens = False
        said = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **said)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm
        found = []
        for key, context, continuation in requests:
            ids = (context + continuation)[-self.max_length :]
            count = min(len(continuation), len(ids) - 1)
            scored = Sampling(0, logprobs=1, echo=True)
            tokens, _logits = self._generator.prompt(ids, scored, _never)
            last = tokens[len(tokens) - count :]
            total = sum(one.logprob or 0.0 for one in last)
            greedy = all(one.token == one.likeliest[0][0] for one in last)
            found.append((total, greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log likelihood of whole texts, in windows of the longest sequence."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(total for total, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues prompts until a stop string, an end token, or `max_gen_toks` tokens."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, prompt: str, how: Mapping[str, Any]) -> str:
        until = how.get("until") or []
        stopper = Stopper([until] if isinstance(until, str) else list(until))
        most = min(int(how.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1)
        warm = float(how.get("temperature") or 0.0) if how.get("do_sample") else 0.0
        sampling = Sampling(most, temperature=warm, top_p=float(how.get("top_p") or 1.0), seed=0)
        ids = self.tok_encode(prompt)[-(self.max_length - most) :] or [self.prefix_token_id]
        _, logits = self._generator.prompt(ids, sampling, _never)
        words, text = Detokenizer(self.tokenizer, ids), ""
        for chosen in self._generator.continuation(logits, sampling, _never):
            text += stopper.add(words.add(chosen.token))
            if stopper.met:
                return text
        return text + stopper.add(words.finish()) + stopper.finish()


def _never() -> bool:
    return False


def register() -> None:
    """Makes lm-eval know the model as `prune-export`."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=EngineLM)
