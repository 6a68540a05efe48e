"""The routes: OpenAI's, the health and the metrics, and the page that shows them.

A response is made of jobs (models/serve/job.py), one for each choice, whose updates the worker sends.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from models.base.errors import NestlingError, UsageError
from models.base.kinds import show
from models.checkpoint.chat import Message
from models.decode.decoder import Decoder
from models.decode.text import encode_prompt
from models.serve.answers import Answer, Json
from models.serve.errors import JsonResponse, UnknownModel, add_errors
from models.serve.job import Job, Update
from models.serve.metrics import Metrics
from models.serve.respond import respond
from models.serve.schema import ChatRequest, CompletionRequest, SamplingBody
from models.serve.served import ServedModel
from models.serve.worker import Worker

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes need."""

    decoder: Decoder
    models: Mapping[str, ServedModel]
    """The model and the members of its family, by name."""
    worker: Worker
    metrics: Metrics
    created: int
    longest_token: int
    """Bytes of the longest token: so many times the context are more than any prompt may have."""

    def check_size(self, served: ServedModel, field: str, texts: Sequence[str]) -> None:
        """Refuse what cannot fit before it is cut into tokens, which takes seconds for some megabytes.

        Raises:
            UsageError: naming the field.
        """
        context = served.target.full.config.max_position_embeddings
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if size > context * self.longest_token:
            raise UsageError(
                f"--{field} has {size} bytes, more than the context of {context} tokens holds of up to "
                f"{self.longest_token} bytes each; shorten it"
            )

    def find(self, name: str) -> ServedModel:
        """Return the model of a name."""
        served = self.models.get(name)
        if served is None:
            raise UnknownModel(f"model {show(name)} is not here; choose from {', '.join(self.models)}")
        return served


def make_app(service: Service) -> FastAPI:
    """Return the application without its guard."""
    app = FastAPI(title="nestling", docs_url=None, redoc_url=None)
    add_errors(app)
    _add_texts(app, service)
    _add_state(app, service)
    return app


def _add_texts(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served = service.find(body.model)
        if body.best_of not in (None, body.n):
            raise UsageError("--best-of: not done; leave it out")
        for prompt in body.prompts:
            service.check_size(served, "prompt", [prompt] if isinstance(prompt, str) else [])
        prompts = await asyncio.to_thread(_encode, service.decoder, served, body.prompts)
        scores = body.echo and body.logprobs is not None
        jobs = _jobs(
            service, served, body, prompts, body.max_tokens, logprobs=body.logprobs, scores_prompt=scores
        )
        echoes: list[str] = []
        if body.echo:
            texts = [_text(service.decoder, prompt) for prompt in body.prompts]
            echoes = [text for text in texts for _ in range(body.n)]
        answer = Answer(model=body.model, jobs=jobs, is_chat=False, echoes=echoes)
        return await respond(service.worker, answer, body, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        served = service.find(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise UsageError("--top-logprobs: has an effect with logprobs only; set it to true")
        messages: list[Message] = [message.as_message() for message in body.messages]
        service.check_size(served, "messages", [message["content"] for message in messages])
        prompt = await asyncio.to_thread(_encode_chat, service.decoder, messages)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        num_top = (body.top_logprobs or 0) if body.logprobs else None
        jobs = _jobs(service, served, body, [prompt], most, logprobs=num_top)
        return await respond(service.worker, Answer(model=body.model, jobs=jobs, is_chat=True), body, request)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> JsonResponse:
        return JsonResponse({"object": "list", "data": [_card(service, name) for name in service.models]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JsonResponse:
        service.find(name)
        return JsonResponse(_card(service, name))

    @app.get("/health")
    async def health() -> JsonResponse:
        return JsonResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.as_prometheus(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = files("models.serve").joinpath("dashboard.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})


def _encode(decoder: Decoder, served: ServedModel, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    return [encode_prompt(served.target, decoder.tokenizer, prompt) for prompt in prompts]


def _encode_chat(decoder: Decoder, messages: Sequence[Message]) -> list[int]:
    try:
        return decoder.encode_chat(messages)
    except NestlingError as error:
        raise UsageError(f"--messages: {error}") from None


def _text(decoder: Decoder, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else decoder.tokenizer.decode(prompt)


def _jobs(
    service: Service,
    served: ServedModel,
    body: SamplingBody,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    *,
    logprobs: int | None,
    scores_prompt: bool = False,
) -> list[Job]:
    """Return a job for each choice of each prompt."""
    context = served.target.full.config.max_position_embeddings
    seeds = [secrets.randbits(63) if body.seed is None else body.seed for _ in prompts]
    updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
    return [
        Job(
            target=served.target,
            tokenizer=service.decoder.tokenizer,
            new_policy=served.new_policy,
            prompt_ids=prompt,
            config=body.generation_config(max_tokens or context, seeds[number]),
            row=row,
            logprobs=logprobs,
            scores_prompt=scores_prompt,
            index=number * body.n + row,
            updates=updates,
        )
        for number, prompt in enumerate(prompts)
        for row in range(body.n)
    ]


def _card(service: Service, name: str) -> Json:
    served = service.models[name]
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "nestling",
        "granularity": str(served.target.granularity),
        "max_model_len": served.target.full.config.max_position_embeddings,
    }
