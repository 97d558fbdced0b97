"""``lora-rite generate`` and ``chat``: text of a model, with an adapter or without, streamed as it comes."""

import math
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame
from ..run.processes import check_alone
from .adapted import attach, load_source
from .chats import common_length
from .load import find_device
from .records import read_text
from .sources import Dtype, find_source

#: Tokens of an answer where nothing else is said, and the positions of the model allow it.
MAX_NEW_TOKENS = 256
#: Beginnings of the names of those options of transformers that are about something else than the text, or ours to set.
NOT_FOR_TEXT = ("_", "output_", "return_dict", "max_length", "is_assistant", "transformers_version", "pad_token_id")
#: Options that mean something in sampling alone.
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"}
Message = dict[str, str]


class Writer:
    """A model that writes: its tokenizer, and how it generates.

    Args:
        source: folder of a run or of an adapter, hub id of an adapter, or a model as ``lora-rite train`` takes it.
        model: the adapter's base model, where it is not the one that the adapter records.
        options: of transformers' ``generate``, by name; None is the model's own.
        dtype: of the weights; None is the checkpoint's.
        bits: 4 or 8 quantises the linear maps; None leaves them as they are.
        device: None is the accelerator if there is one, else the CPU.
        trust_remote_code: allow the model's own code to run.
        system: system message of a conversation, for a model with a chat template.
        raw: use no chat template.
        prompt: what :meth:`answer` will be asked first: looked at before the weights are loaded.

    Raises:
        LoRARiteValueError: a model, an adapter, an option or a device that cannot be used; one of several processes.
    """

    tokenizer: Any
    config: Any
    templated: bool

    def __init__(
        self,
        source: str,
        model: str | None,
        options: dict[str, Any],
        *,
        dtype: Dtype | None = None,
        bits: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        system: str | None = None,
        raw: bool = False,
        prompt: str | None = None,
    ):
        import torch

        check_alone("lora-rite generate")
        self.options = _check_options(options)
        device = find_device(device)
        found = find_source(source, model)
        self.begin = [] if system is None else [{"role": "system", "content": system}]

        def check(tokenizer: Any, config: Any) -> None:
            self.tokenizer, self.config = tokenizer, config
            self.templated = _check_template(tokenizer, system, raw)
            if prompt is not None:
                self._room(self._tokens(self.asked(prompt)).shape[1])

        load = {"bits": bits, "trust_remote_code": trust_remote_code, "check": check}
        network, self.tokenizer = load_source(found, dtype, **load)
        network = attach(network, found)
        with blame(f"--device {device}"):
            self.network = network.to(device)
        own = self.network.generation_config
        several = (self.options.get(key, getattr(own, key, None)) for key in ("num_beams", "num_return_sequences"))
        self.streams = all(number in (None, 1) for number in several)
        self._past: tuple[list[int], Any] | None = None
        token = next(n for n in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0) if n is not None)
        with blame("the options of generation"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a least number of tokens, which one is not
            self._run(torch.tensor([[token]], device=self.network.device), 1)

    def asked(self, text: str) -> str | list[Message]:
        """A prompt that begins a conversation, where there is a chat template for it; else the text as it is."""
        return [*self.begin, {"role": "user", "content": text}] if self.templated else text

    def encode(self, prompt: str | list[Message]) -> Any:
        """Token ids (1, tokens) of a text, or of a conversation by the model's chat template.

        Raises:
            LoRARiteValueError: no tokens, tokens that the model has not, or a template that refuses the conversation.
        """
        ids = self._tokens(prompt)
        if (largest := int(ids.max())) >= (known := self.network.get_input_embeddings().weight.shape[0]):
            raise LoRARiteValueError(f"the tokenizer gives token {largest}, and the model knows {known} tokens")
        return ids.to(self.network.device)

    def _tokens(self, prompt: str | list[Message]) -> Any:
        if isinstance(prompt, str):
            with blame("the prompt"):
                found = self.tokenizer(prompt, return_tensors="pt")
        else:
            with blame("the model's chat template"):
                found = self.tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
        ids = found["input_ids"].long()
        if not ids.numel():
            raise LoRARiteValueError("the prompt is empty: give it by --prompt, --prompt_file or standard input")
        return ids

    def answer(self, prompt: str | list[Message], show: Callable[[str], None]) -> str:
        """What the model writes to a prompt; ``show`` gets it in pieces, as it comes (with beams, at the end).

        Raises:
            LoRARiteValueError: as :meth:`encode`; or the prompt and the new tokens are more than the model's positions.
        """
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                show(text)

        ids = self.encode(prompt)
        new = self._room(ids.shape[1])
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if self.streams else None
        output = self._run(ids, new, streamer, self._past_of(ids[0].tolist()))
        self._keep(output)
        start = 0 if self.network.config.is_encoder_decoder else ids.shape[1]
        texts = self.tokenizer.batch_decode(output.sequences[:, start:], skip_special_tokens=True)
        if not self.streams:
            show("\n".join(texts))
        return texts[0]

    def _room(self, prompt: int) -> int:
        """How many tokens may be generated.

        Raises:
            LoRARiteValueError: none, or not as many as --max_new_tokens asks for.
        """
        config = self.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        wanted = self.options.get("max_new_tokens")
        if not isinstance(positions, int):
            return wanted or MAX_NEW_TOKENS
        left = positions if config.is_encoder_decoder else positions - prompt
        if prompt > positions or left < (wanted or 1):
            raise LoRARiteValueError(
                f"the prompt has {prompt} tokens, and the model {positions} positions: that leaves {max(left, 0)} for "
                f"--max_new_tokens {wanted or MAX_NEW_TOKENS}"
            )
        return min(wanted or MAX_NEW_TOKENS, left)

    def _past_of(self, ids: list[int]) -> Any:
        """The cache of keys and values of the last answer, cut to the beginning that a prompt has in common with it and
        with what came before it; None where there is none."""
        if self._past is None:
            return None
        (seen, cache), self._past = self._past, None  # how far an answer comes that Ctrl-C ends, the cache does not say
        common = common_length(seen, ids[:-1])  # of the last token the model has to predict the next one
        try:
            if common < len(seen):
                cache.crop(common - len(seen))
        except (RuntimeError, ValueError):  # a sliding window has forgotten what stood before
            return None
        return cache

    def _keep(self, output: Any) -> None:
        """Keeps the cache of an answer for :meth:`_past_of`, where it is one of keys and values alone."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        cache = getattr(output, "past_key_values", None)
        own = getattr(self.network.generation_config, "cache_implementation", None)
        if type(cache) is not DynamicCache or self.options.get("cache_implementation", own) or not self.streams:
            return
        # A recurrent layer's state cannot be cut, and models pass over it where more than one token follows.
        if {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
            self._past = output.sequences[0, : cache.get_seq_length()].tolist(), cache

    def _run(self, ids: Any, tokens: int, streamer: Any = None, past: Any = None) -> Any:
        import torch

        padding = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        options = {**self.options, "max_new_tokens": tokens, "pad_token_id": padding}
        if "stop_strings" in options:
            options["tokenizer"] = self.tokenizer
        if past is not None:
            options["past_key_values"] = past
        with torch.inference_mode():
            return self.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                return_dict_in_generate=True,
                **options,
            )


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that are given, and what follows from them: a temperature of 0 is greedy, any other one samples.

    Raises:
        LoRARiteValueError: transformers has no option of the name, or it is not one for text alone.
    """
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith(NOT_FOR_TEXT)}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise LoRARiteValueError(
                f"--generation_args.{name}: no such option of generation{f', did you mean {near[0]}?' if near else ''}"
            )
    if given.get("temperature") == 0:
        return {**given, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, **given} if SAMPLING & given.keys() else given


def generation_options(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    more: dict[str, Any] | None,
    seed: int = 0,
) -> dict[str, Any]:
    """The options of ``generate`` and ``chat``, checked, as those of transformers, to which the seed does not belong.

    Raises:
        LoRARiteValueError: one is out of its range, or given twice.
    """
    named = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    for name in more or {}:
        if name in named:
            raise LoRARiteValueError(f"--generation_args.{name}: give it by --{name}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise LoRARiteValueError(f"--max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise LoRARiteValueError(f"--temperature must be a finite number ≥ 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise LoRARiteValueError(f"--top_p must be above 0 and at most 1, got {top_p}")
    if top_k is not None and top_k < 1:
        raise LoRARiteValueError(f"--top_k must be at least 1, got {top_k}")
    if not 0 <= seed < 2**32:
        raise LoRARiteValueError(f"--seed must be from 0 to 2³² − 1, got {seed}")
    return {**named, **(more or {})}


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt that is given, or that of a file, or of standard input; of these two without the last line's end.

    Raises:
        LoRARiteValueError: both are given, or it is not UTF-8 text.
    """
    if prompt is not None and file is not None:
        raise LoRARiteValueError("give either --prompt or --prompt_file")
    if file is not None:
        return read_text(file).removesuffix("\n")
    if prompt is None:
        if sys.stdin.isatty():
            print("the prompt, ended by Ctrl-D:", file=sys.stderr)
        prompt = _decoded(sys.stdin.read).removesuffix("\n")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # a lone surrogate, as Python reads bytes of arguments that are not UTF-8
        raise LoRARiteValueError("the prompt is not UTF-8 text") from None
    return prompt


def _decoded(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise LoRARiteValueError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None


def show(text: str) -> None:
    """Writes a piece of text to standard output at once."""
    print(text, end="", flush=True)


def chat(writer: Writer) -> None:
    """A conversation on standard input and output, until the input ends, Ctrl-C, or ``/exit``; ``/new`` begins another.

    Without a chat template, or with the writer's ``raw``, the model goes on with the text so far, the user's lines and
    its own. Ctrl-C while it writes ends the answer, which stays in the conversation as far as it came.

    Raises:
        LoRARiteValueError: input that is not UTF-8.
    """
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 (the keys that edit a line)
        print("/new begins another conversation, /exit or Ctrl-D ends", file=sys.stderr)
    messages, text = [*writer.begin], ""
    while True:
        try:
            line = _decoded(lambda: input("> " if on_terminal else ""))
        except (EOFError, KeyboardInterrupt):
            if on_terminal:
                print()
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/new":
            messages, text = [*writer.begin], ""
        elif line.strip():
            said = [*messages, {"role": "user", "content": line}]
            answer = _answer(writer, said if writer.templated else f"{text}{line}\n")
            if answer is not None:
                messages, text = [*said, {"role": "assistant", "content": answer}], f"{text}{line}\n{answer}\n"


def _answer(writer: Writer, prompt: str | list[Message]) -> str | None:
    """What the model has written, and shown; None where the conversation cannot go on so, which is said."""
    pieces: list[str] = []

    def keep(piece: str) -> None:
        pieces.append(piece)
        show(piece)

    try:
        writer.answer(prompt, keep)
    except KeyboardInterrupt:
        show(" …")
    except LoRARiteValueError as error:
        print(f"lora-rite: {error} (/new begins another conversation)", file=sys.stderr)
        return None
    show("\n")
    return "".join(pieces)


def _check_template(tokenizer: Any, system: str | None, raw: bool) -> bool:
    """Whether a prompt goes through the model's chat template; says on stderr what is done.

    Raises:
        LoRARiteValueError: a system message has no place where it does not.
    """
    templated = bool(tokenizer.chat_template) and not raw
    if system is not None and not templated:
        raise LoRARiteValueError("--system needs the model's chat template" + ("" if raw else ", and it has none"))
    if templated:
        print("lora-rite: in the model's chat template (--raw: the text as it is)", file=sys.stderr)
    elif not raw:
        print("lora-rite: the model has no chat template: it goes on with the text as it is", file=sys.stderr)
    return templated
