"""A text that is being written: its engine's tokens become what its client is sent."""

from dataclasses import dataclass, field

from models.decode.engine.engine import Committed, Token
from models.decode.engine.report import Report
from models.decode.text import TextBuilder
from models.serve.job import Job, Update
from models.serve.prefixes import Text


@dataclass
class LiveText:
    """A text that is being written."""

    job: Job
    text: Text
    builder: TextBuilder
    last: float | None = None
    """When its last tokens came."""
    ended: str = ""
    error: Exception | None = None
    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)

    @property
    def report(self) -> Report:
        """The report of the request."""
        return self.job.report

    def take(self, event: Committed | Exception) -> None:
        """Take a token, or what went wrong."""
        if isinstance(event, Exception):
            self.error, self.ended = event, "error"
            return
        token, position, finish_reason = event
        self.report.count_token(position if token.drafted else None)
        self.report.finish_reason = finish_reason
        self.tokens.append(token)
        if finish_reason != "eos":  # the end token's text is no part of the output
            self.pieces.append(self.builder.add(token.id))
        if finish_reason or self.builder.stopped:
            self.pieces.append(self.builder.finish())
            self.ended = "length" if finish_reason == "length" and not self.builder.stopped else "stop"
            if self.builder.stopped:
                self.report.finish_reason = "stop"

    def update(self) -> Update:
        """Return what has come since the last update."""
        pieces, tokens = self.pieces, self.tokens
        self.pieces, self.tokens = [], []
        finish_reason = "" if self.error else self.ended
        return Update(
            text="".join(pieces), tokens=tuple(tokens), finish_reason=finish_reason, error=self.error
        )
