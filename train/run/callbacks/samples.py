"""Lets every member continue the same held-out text greedily, to be read side by side."""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from tokenizers import Tokenizer

from models.decode.detokenize import continuation
from models.decode.engine.engine import stream
from models.elastic.granularity import Granularity
from models.elastic.view import View
from train.run.callbacks.step import StepCallback
from train.run.fsdp import gather_model
from train.run.metrics import MetricsLog
from train.run.module import JointModule


class Samples(StepCallback):
    """Writes a `sample` line per member every n steps.

    Args:
        log: takes the lines.
        members: the granularities that speak.
        prompt_ids: tokens to continue.
        tokenizer: turns ids into text.
        every: optimizer steps between samples.
        num_tokens: length of a sample, in tokens.
    """

    def __init__(
        self,
        log: MetricsLog,
        members: Mapping[str, Granularity],
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        *,
        every: int,
        num_tokens: int = 48,
    ) -> None:
        super().__init__(every=every)
        self.lines, self.members, self.prompt_ids = log, dict(members), list(prompt_ids)
        self.tokenizer, self.num_tokens = tokenizer, num_tokens

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Let each member speak."""
        model = gather_model(module.model, wanted=trainer.is_global_zero)
        if model is None:
            return
        texts = {}
        prompt = self.tokenizer.decode(self.prompt_ids, skip_special_tokens=False)
        for name, granularity in self.members.items():
            view = View(model, granularity)
            tokens = stream(view, self.prompt_ids, max_new_tokens=self.num_tokens)
            texts[name] = continuation(self.tokenizer, self.prompt_ids, [token.id for token in tokens])
            self.lines.write("sample", module.step, {"member": name, "prompt": prompt, "text": texts[name]})
        rows = [[module.step, name, prompt, text] for name, text in texts.items()]
        self.lines.mirror_table("samples", module.step, ["step", "member", "prompt", "text"], rows)
