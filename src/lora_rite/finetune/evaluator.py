"""A model, measured on the tasks and texts of an evaluation."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame
from ..run.versions import versions
from .chats import set_chat_template
from .data import Sample
from .judges import FEWSHOT_SEED, lm_eval_tasks
from .labelled import predict_labelled
from .load import attach_adapter, check_attaching, find_device, load_model
from .plans import Plan, model_digest
from .scores import MAIN_METRIC, instruction_scores
from .trainer import held_out_loss
from .windows import IGNORED, Windows, check_padding, label_count, windows

#: Tokens that are generated for an instruction, as in Tk-Instruct.
INSTRUCTION_TOKENS = 128
#: What lm_eval's filters give where they find no answer.
NO_ANSWER = ("", "[invalid]")


class Evaluator:
    """The model, and what evaluates it on a plan.

    Raises:
        LoRARiteValueError: the model cannot be evaluated so; nothing has been measured then.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        plans: list[Plan],
        device: str | None,
        trust_remote_code: bool,
        progress: bool,
    ) -> None:
        from .limits import find_limits

        self.progress = progress
        texts = {plan.name: plan.texts for plan in plans if plan.texts}
        made: dict[str, Windows] = {}

        def check(tokenizer: Any, config: Any) -> None:
            if settings["chat_template"] is not None:
                set_chat_template(tokenizer, Path(settings["chat_template"]))
            check_padding(tokenizer, settings["model"])
            how = {"encoder_decoder": config.is_encoder_decoder}
            for name, part in texts.items():
                made[name] = windows(part, tokenizer, settings["max_length"], **how)
            if settings["adapter"] is not None:
                check_attaching(config, trust_remote_code, adapter=Path(settings["adapter"]))

        device = find_device(device)
        network, self.tokenizer = load_model(
            settings["model"],
            dtype=settings["dtype"],
            bits=settings["bits"],
            trust_remote_code=trust_remote_code,
            progress=progress,
            check=check,
        )
        self.settings = {**settings, "model_digest": settings["model_digest"] or model_digest(settings["model"])}
        self.limits = find_limits(network, self.tokenizer, settings["model"])
        if (size := self.tokenizer.vocab_size) > self.limits.tokens and any(plan.kind != "text" for plan in plans):
            raise LoRARiteValueError(
                f"the tokenizer of --model has {size} tokens, and the model knows {self.limits.tokens}"
            )
        self.windows = {name: self._fitting(found, texts[name], network) for name, found in made.items()}
        if settings["adapter"] is not None:
            network = attach_adapter(network, adapter=Path(settings["adapter"]))
        predict_labelled(network)
        with blame(f"--device {device}"):
            self.network = network.to(device).eval()
        for plan in plans:  # what is wrong with one must not be found out after hours at another
            self._answer_tokens(plan)

    def __call__(self, plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Figures, settings and versions of a task; and its answers."""
        begin = time.perf_counter()
        figures: dict[str, Any] = {}
        samples: list[dict[str, Any]] = []
        loss = {"loss": self._loss(plan)} if plan.texts else {}
        if plan.judge is not None:
            figures, samples = self._by_lm_eval(plan)
        elif plan.kind == "instructions" and not self.settings["loss_only"]:
            predictions, cut = self._generate(plan)
            figures, samples = instruction_scores(plan.rows, predictions)
            figures["cut"] = cut
        packages = () if plan.kind == "text" or self.settings["loss_only"] else ("lm_eval", "rouge-score", "datasets")
        record = {
            "task": plan.name,
            "results": {**figures, **loss},
            "source": plan.source,
            "settings": {**self.settings, "data_sha256": plan.sha256},
            "model": {
                "parameters": self.network.num_parameters(),  # (two weights of 4 bits are one of p.numel())
                "dtype": str(self.network.dtype).removeprefix("torch."),
                "device": str(self.network.device),
            },
            "seconds": time.perf_counter() - begin,
            "versions": versions(*packages),
        }
        return record, samples

    def _fitting(self, found: Windows, texts: Sequence[Sample], network: Any) -> tuple[Windows, int]:
        """The windows in which the loss of texts is measured, and their length: made anew where the model's is less."""
        from .limits import check_rows

        limits, encoder_decoder = self.limits, network.config.is_encoder_decoder
        most = (self.settings["max_length"], limits.positions, limits.answer_positions, limits.declared)
        length = min(limit for limit in most if limit is not None)
        if length < self.settings["max_length"]:
            found = windows(texts, self.tokenizer, length, encoder_decoder=encoder_decoder)
        check_rows(found.rows, limits, network, self.tokenizer)
        return found, length

    def _loss(self, plan: Plan) -> dict[str, Any]:
        from transformers import DataCollatorForSeq2Seq

        (rows, cut, _), length = self.windows[plan.name]
        collator = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        loss = held_out_loss(self.network, rows, collator, self.settings["batch_size"], progress=self.progress)
        return {
            "nat_per_token": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "tokens": label_count(rows, self.network.config.is_encoder_decoder),
            "examples": len(plan.texts),
            "cut": cut,
            "window": length,
        }

    @cached_property
    def _lm(self) -> Any:
        """The model as lm_eval's."""
        lm_eval_tasks()
        from lm_eval.models.huggingface import HFLM

        options = {"batch_size": self.settings["batch_size"], "max_length": self.limits.positions}
        lm: Any = HFLM(self.network, tokenizer=self.tokenizer, **options)  # type: ignore[call-arg]
        for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, request, partial(getattr(lm, request), disable_tqdm=not self.progress))
        return lm

    def _answer_tokens(self, plan: Plan) -> int:
        """Tokens that are generated for an answer; 0 where none is.

        Raises:
            LoRARiteValueError: they leave no room for a prompt.
        """
        tokens = self.settings["max_new_tokens"]
        if plan.judge is not None and plan.judge.OUTPUT_TYPE == "generate_until":
            tokens = tokens or plan.judge.get_config("generation_kwargs").get("max_gen_toks", self._lm.max_gen_toks)
        elif plan.kind == "instructions" and not self.settings["loss_only"]:
            tokens = tokens or INSTRUCTION_TOKENS
        else:
            return 0
        if not self.network.config.is_encoder_decoder and tokens >= self._lm.max_length:
            raise LoRARiteValueError(
                f"{plan.name}: answers of {tokens} tokens leave no room for a prompt in the model's "
                f"{self._lm.max_length}; give --max_new_tokens"
            )
        return tokens

    def _by_lm_eval(self, plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        import lm_eval

        lm = self._lm
        name, judge = plan.judge.task_name, plan.judge
        room = self._answer_tokens(plan)
        generated = room > 0
        if generated and self.settings["max_new_tokens"] is not None:
            judge.set_config(key="generation_kwargs", value={"max_gen_toks": room}, update=True)
        tasks: Any = {"tasks": {name: judge}}
        output: Any = lm_eval.evaluate(lm, tasks, limit=self.settings["limit"])
        metrics: dict[str, float] = {}
        stderr: dict[str, float] = {}
        for key, value in output["results"][name].items():
            metric, _, which = key.partition(",")
            if which and isinstance(value, (int, float)):
                into = stderr if metric.endswith("_stderr") else metrics
                into[metric.removesuffix("_stderr") + ("" if which == "none" else f",{which}")] = value
        answers = output["samples"][name]
        failed = Counter(answer["filter"] for answer in answers if _is_unparsed(answer["filtered_resps"], generated))
        limit = lm.max_length + 1  # the last token is only predicted
        if generated:
            limit = lm.max_length - (0 if self.network.config.is_encoder_decoder else room)
        figures = {
            "metric": MAIN_METRIC.get(plan.kind, next(iter(metrics))),
            "metrics": metrics,
            "stderr": stderr,
            "n": len({answer["doc_id"] for answer in answers}),
            "unparsed": {metric: failed[metric.partition(",")[2] or "none"] for metric in metrics},
            "cut": _count_cut(lm, answers, limit),
            "num_fewshot": judge.get_config("num_fewshot"),
            "fewshot_seed": FEWSHOT_SEED,
        }
        keep = ("doc_id", "filter", "target", "resps", "filtered_resps", *{key.partition(",")[0] for key in metrics})
        samples = [{key: answer[key] for key in keep if key in answer} | _texts(answer) for answer in answers]
        return figures, samples

    def _generate(self, plan: Plan) -> tuple[list[str], int]:
        """Answers to instructions, greedily, and how many prompts are too long and are cut.

        As in Tk-Instruct a prompt has as many positive examples as fit, and if it is too long without, its end is cut;
        of a causal model's prompt the beginning, since it has to end on "Output:". A causal model's answer ends before
        a blank line, where the examples in its prompt end.
        """
        from lm_eval.api.instance import Instance

        lm, tokens = self._lm, self._answer_tokens(plan)
        encoder_decoder = self.network.config.is_encoder_decoder
        room = min(self.settings["max_length"], lm.max_length - (0 if encoder_decoder else tokens))
        how = {"max_length": tokens} if encoder_decoder else {"max_gen_toks": tokens, "until": ["\n\n"]}
        requests, cut = [], 0
        for n, (prompt, _, shorter, _) in enumerate(plan.texts):
            text = next((text for text in (prompt, *shorter) if len(lm.tok_encode(text)) <= room), None)
            if text is None:
                cut += 1
                ids = lm.tok_encode((prompt, *shorter)[-1])
                text = lm.tok_decode(ids[:room] if encoder_decoder else ids[-room:])
            requests.append(Instance("generate_until", {}, (text, {"do_sample": False, **how}), n))
        return [answer.strip() for answer in lm.generate_until(requests)], cut


def _texts(answer: dict[str, Any]) -> dict[str, Any]:
    """The ``prompt`` of an answer, and the ``choices`` in the order of their log-likelihoods: whole, where each has a
    context of its own."""
    texts = [[part for part in argument if isinstance(part, str)] for argument in answer["arguments"]]
    prompts = {parts[0] for parts in texts if len(parts) > 1}
    if len(prompts) == 1 and all(len(parts) > 1 for parts in texts):
        return {"prompt": prompts.pop(), "choices": ["".join(parts[1:]) for parts in texts]}
    whole = ["".join(parts) for parts in texts]
    return {"prompt": whole[0]} if len(whole) == 1 else {"choices": whole}


def _is_unparsed(answers: Any, generated: bool) -> bool:
    """No answer was found in a generated text; or a choice's log-likelihood is not finite, so that none is the best."""
    if generated:
        return any(isinstance(answer, str) and answer.strip() in NO_ANSWER for answer in answers)
    return any(not math.isfinite(answer[0]) for answer in answers if isinstance(answer, (tuple, list)))


def _count_cut(lm: Any, answers: list[dict[str, Any]], limit: int) -> int:
    """How many questions lm_eval has cut at their beginning to ``limit`` tokens."""
    cut = 0
    for answer in {answer["doc_id"]: answer for answer in answers}.values():  # a filter each
        # arguments: a context, and the continuation or how to generate
        texts = ("".join(part for part in argument if isinstance(part, str)) for argument in answer["arguments"])
        cut += any(len(lm.tok_encode(text)) > limit for text in texts)
    return cut
