"""`nestling demo --model MODEL`: a draft for a model that must not change, in a few minutes on two cores.

the model answers questions -> what a draft owns learns from them -> an answer, plainly and drafted
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from models.base.errors import NestlingError
from models.base.files import write_text
from models.base.progress import progress_bar
from models.checkpoint.folder import load_model, read_config
from models.decode.decoder import Decoder, open_decoder
from models.decode.sampling.params import SamplingParams
from models.decode.text import GenerationResult, TextOrIds
from models.machine.card import machine_card
from models.packed.quantize import Q4_0
from train.recipe.recipe import Recipe, load_recipe
from train.report.tables import FAMILY_LEGEND, family_table
from train.run.dryrun import estimate_run
from train.run.fit import fit

TOPICS = (
    "the moon",
    "bread",
    "a river",
    "music",
    "trains",
    "sleep",
    "a library",
    "the heart",
    "rain",
    "chess",
)
QUESTIONS = (
    "What is {}?",
    "Tell me a short story about {}.",
    "Give me three facts about {}.",
    "Why is {} important?",
    "Explain {} to a child.",
    "Write an email about {}.",
)
ASKED = "Why is the sky blue?"
NUM_TOKENS = 128
BATCH = 10
ANSWERING_SECONDS = 60
TRAINING_SECONDS = 150
LEAST_STEPS, MOST_STEPS = 10, 400
SHORT = 128
"""Positions of a row: answers are short."""


def run_demo_pretrained(
    model: Path, out: Path, console: Console, *, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Run it.

    Args:
        model: a model folder or a GGUF file, which stays as it is.
        out: the run folder; one that is there is replaced.
        console: shows the progress.
        overrides: recipe keys that differ from the demo's.

    Returns:
        What was measured, for JSON.

    Raises:
        NestlingError: if the draft changed the text, which would be a bug of ours.
    """
    started = time.perf_counter()
    console.rule(f"1. {model} answers questions")
    answers = out.with_name(f"{out.name}-answers.jsonl")
    messages_field = write_answers(model, answers, console)

    console.rule("2. a draft learns from the answers; the model itself stays as it is")
    recipe = choose_recipe(model, answers, overrides, messages_field)
    path = fit(recipe, out, resume="never", console=console)
    folder = load_model(path)
    console.print(family_table(folder.members).to_rich(caption=FAMILY_LEGEND))

    console.rule("3. a question, answered plainly and with the draft")
    speed = answer_twice(path, console)
    seconds = time.perf_counter() - started
    console.rule(f"done in {seconds / 60:.1f} minutes")
    console.print(f"\nask more   nestling generate {path} --chat --draft {drafting_name()}", markup=False)
    return {
        "members": [asdict(member) for member in folder.members],
        "steps": recipe.trainer.max_steps,
        "decoding": speed,
        "seconds": seconds,
    }


def write_answers(model: Path, path: Path, console: Console) -> str | None:
    """Write the model's own answers as JSON lines, until the time is over.

    Returns:
        The field of the conversations; None for a model without a chat template, which continues text.
    """
    decoder = open_decoder(model, draft="none", params=SamplingParams(temperature=0.8))
    is_chat = decoder.folder.chat_template is not None
    questions = [question.format(topic) for question, topic in itertools.product(QUESTIONS, TOPICS)]
    lines: list[str] = []
    deadline = time.perf_counter() + ANSWERING_SECONDS
    with progress_bar("answering", len(questions), console=console) as bar:
        for first in range(0, len(questions), BATCH):
            batch = questions[first : first + BATCH]
            results = decoder.generate_batch(
                [_prompt(decoder, one) for one in batch], first_row=first, max_new_tokens=_room(decoder)
            )
            lines += [_line(one, result.text, is_chat) for one, result in zip(batch, results, strict=True)]
            bar.advance(len(batch))
            if time.perf_counter() > deadline:
                break
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return "messages" if is_chat else None


def _prompt(decoder: Decoder, question: str) -> TextOrIds:
    if decoder.folder.chat_template is None:
        return question
    return decoder.encode_chat([{"role": "user", "content": question}])


def _line(question: str, answer: str, is_chat: bool) -> str:
    if not is_chat:
        return json.dumps({"text": question + answer})
    roles = (("user", question), ("assistant", answer))
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in roles]})


def _room(decoder: Decoder) -> int:
    """Return how many tokens an answer may have, in contexts of any length."""
    return min(NUM_TOKENS, decoder.folder.model.config.max_position_embeddings // 2)


def choose_recipe(model: Path, answers: Path, overrides: Sequence[str], messages_field: str | None) -> Recipe:
    """Return the recipe, with as many steps as fit into `TRAINING_SECONDS` by the machine card."""
    config = read_config(model.expanduser())
    words = [
        f"model.from={model}",
        "model.train=owned",
        f"data.source={answers}",
        f"data.messages_field={messages_field or 'null'}",
        "data.valid_fraction=0.1",
        f"data.sequence_length={min(SHORT, config.max_position_embeddings)}",
        "trainer.batch_size=8",
        "trainer.limit_val_batches=2",
        "tracking.wandb=disabled",
    ]
    recipe = load_recipe(overrides=[*words, *overrides])
    if any("trainer.max_steps" in word for word in overrides):
        return recipe
    each = estimate_run(recipe, config, machine_card()).seconds / recipe.trainer.max_steps
    steps = max(LEAST_STEPS, min(MOST_STEPS, int(TRAINING_SECONDS / each)))
    schedule = [f"trainer.max_steps={steps}", f"optim.warmup_steps={max(1, steps // 20)}"]
    ends = [f"trainer.{key}={steps}" for key in ("val_check_interval", "checkpoint_every")]
    return load_recipe(overrides=[*words, *schedule, *ends, *overrides])


def drafting_name() -> str:
    """Return the draft as it is fastest here: in 4 bits, which run on processors."""
    return "D" if machine_card().gpu else f"D@{Q4_0}"


def answer_twice(path: Path, console: Console) -> dict[str, Any]:
    """Answer a question with and without the draft, and compare.

    Raises:
        NestlingError: if the draft changed the text.
    """
    draft = drafting_name()
    plain, drafted = open_decoder(path, draft="none"), open_decoder(path, draft=draft)
    pairs = [(_answer(plain), _answer(drafted)) for _ in range(2)]  # the first pass warms up
    (alone, helped) = pairs[-1]
    if alone.ids != helped.ids:
        raise NestlingError("speculative decoding wrote other tokens than plain; please report this")
    console.print(f"{ASKED}\n", style="dim", markup=False)
    console.print(helped.text, markup=False)
    before, after = (one.report.tokens_per_second or 0.0 for one in (alone, helped))
    report = helped.report
    console.print(
        f"\nthe same {len(helped.ids)} tokens: plain {before:.0f} tokens/s, drafted {after:.0f}; "
        f"{report.tau or 1:.2f} tokens for each pass of the full model",
        markup=False,
    )
    return {
        "ids_equal": True,
        "dtype": plain.dtype,
        "draft": draft,
        "plain_tokens_per_second": before,
        "tokens_per_second": after,
        "tau": report.tau,
        "alpha": report.alpha,
        "text": helped.text,
    }


def _answer(decoder: Decoder) -> GenerationResult:
    return decoder.generate(_prompt(decoder, ASKED), max_new_tokens=_room(decoder))
