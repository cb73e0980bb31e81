"""Triton's Python backend: generates with onnxruntime-genai, and streams what comes.

It is copied into a model repository as `model.py`, where Triton imports it: nothing of
prune_export is there. One request is answered at a time. `stream` decides whether the text comes
in pieces or as one.
"""

import json
import os
import sys
from pathlib import Path

# Triton's process does not read PYTHONPATH by itself.
for _folder in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    if _folder and _folder not in sys.path:
        sys.path.insert(0, _folder)

DEFAULT_TOKENS = 256


class Held:
    """Holds back what may be the beginning of a stop string; `met` once one was found."""

    def __init__(self, stops):
        self.stops = [stop for stop in stops if stop]
        self.text = ""
        self.met = False

    def add(self, text):
        """The text that is surely before any stop string."""
        self.text += text
        places = [self.text.find(stop) for stop in self.stops if stop in self.text]
        if places:
            self.met = True
            found, self.text = self.text[: min(places)], ""
            return found
        keep = 0
        for stop in self.stops:
            sizes = range(min(len(stop) - 1, len(self.text)), 0, -1)
            keep = max(keep, next((n for n in sizes if self.text.endswith(stop[:n])), 0))
        cut = len(self.text) - keep
        found, self.text = self.text[:cut], self.text[cut:]
        return found


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        """Opens the engine in the folder `engine` beside this file."""
        import onnxruntime_genai as og

        engine = Path(__file__).resolve().parent / "engine"
        self._og = og
        self._model = og.Model(str(engine))
        self._tokenizer = og.Tokenizer(self._model)
        said = json.loads((engine / "genai_config.json").read_text(encoding="utf-8"))
        ends = said["model"]["eos_token_id"]
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._longest = min(said["model"]["context_length"], said["search"]["max_length"])

    def execute(self, requests):
        """Answers requests one after the other, each through its own sender."""
        import triton_python_backend_utils as pb

        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(pb, request, sender)
            except Exception as error:
                problem = pb.TritonError(f"{type(error).__name__}: {error}")
                sender.send(pb.InferenceResponse(error=problem))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        """Frees the engine."""
        self._tokenizer = self._model = None

    def _answer(self, pb, request, sender):
        import numpy as np

        asked = _Asked(pb, request)
        text = asked.text("text_input")
        ids = self._tokenizer.encode(text)
        most = asked.one("max_tokens", DEFAULT_TOKENS)
        if len(ids) == 0 or most < 1 or len(ids) + 1 > self._longest:
            raise ValueError(
                f"{len(ids)} tokens of text_input and max_tokens {most} do not fit in "
                f"1 to {self._longest}"
            )
        longest = min(len(ids) + most, self._longest)
        warm = float(asked.one("temperature", 0.0))
        options = {"max_length": longest, "min_length": 0, "do_sample": warm > 0}
        if warm > 0:
            options |= {
                "temperature": warm, "top_p": float(asked.one("top_p", 1.0)), "top_k": 0,
            }  # fmt: skip
            seed = asked.one("seed", None)
            if seed is not None:
                options["random_seed"] = int(seed)
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(**options)
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(ids)
        words, held = self._tokenizer.create_stream(), Held(asked.texts("stop"))
        stream, count, waiting, finish = bool(asked.one("stream", False)), 0, "", "length"

        def tell(text, finish):
            outputs = [
                pb.Tensor("text_output", np.array([text.encode()], dtype=np.object_)),
                pb.Tensor("finish_reason", np.array([finish.encode()], dtype=np.object_)),
                pb.Tensor("completion_tokens", np.array([count], dtype=np.int32)),
            ]
            sender.send(pb.InferenceResponse(output_tensors=outputs))

        while len(ids) + count < longest:
            if sender.is_cancelled():
                return
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self._ends:
                finish = "stop"
                break
            count += 1
            waiting += held.add(words.decode(token))
            if held.met:
                finish = "stop"
                break
            if stream and waiting:
                tell(waiting, "")
                waiting = ""
        tell(waiting + held.text, finish)


class _Asked:
    """The inputs of a request; those that are not there have a default."""

    def __init__(self, pb, request):
        self._pb, self._request = pb, request

    def one(self, name, default):
        found = self._pb.get_input_tensor_by_name(self._request, name)
        return default if found is None else found.as_numpy().reshape(-1)[0].item()

    def text(self, name):
        found = self._pb.get_input_tensor_by_name(self._request, name)
        return _decoded(found.as_numpy().reshape(-1)[0])

    def texts(self, name):
        found = self._pb.get_input_tensor_by_name(self._request, name)
        return [] if found is None else [_decoded(one) for one in found.as_numpy().reshape(-1)]


def _decoded(value):
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
