"""The backend for OpenAI-compatible servers: concurrent requests, retries, several endpoints."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

import openai

from megatron_longpo.config.backends import BackendConfig, ServerConfig
from megatron_longpo.data.text.chat import prompt_ids
from megatron_longpo.data.text.tokenizers import load_tokenizer
from megatron_longpo.errors import UserError
from megatron_longpo.generation.backends.base import BackendError, Completion, Request
from megatron_longpo.generation.backends.endpoints import Endpoint, EndpointPool, backoff

CONNECT_SECONDS = 10.0

RETRIED = (408, 409, 429)
"""Statuses below 500 after which the same request may succeed."""


class _Failed(Exception):
    """One try failed, and another may succeed; the text is the reason that is counted."""


class _HeldUp(Exception):
    """The endpoint takes no requests now; the text says why."""


class ServerBackend:
    """Sends requests to the endpoints of `server`; at most `server.concurrency` at a time."""

    def __init__(self, config: BackendConfig) -> None:
        server = config.server
        self._config = server
        self._key = _api_key(server)
        urls = [url.rstrip("/") for url in dict.fromkeys(server.endpoints)]
        self.tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
        self.context_length = config.context_length or _positions(config.model)
        self.documents_at_once = server.concurrency
        options: dict[str, Any] = {
            "api_key": self._key or "none",  # the client insists on one
            "max_retries": 0,  # ours go to other endpoints too
            "timeout": openai.Timeout(server.timeout_seconds, connect=CONNECT_SECONDS),
        }
        self._model = self._served_model(urls, options)
        self._pool = EndpointPool(
            [Endpoint(url=url, client=openai.AsyncOpenAI(base_url=url, **options)) for url in urls],
            outage_seconds=server.outage_minutes * 60,
        )
        self._slots = asyncio.Semaphore(server.concurrency)
        self._told: set[str] = set()

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        tasks = [asyncio.create_task(self._answer(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def close(self) -> None:
        for endpoint in self._pool.endpoints:
            await endpoint.client.close()

    # ------------------------------------------------------------ one request

    async def _answer(self, request: Request) -> Completion | BackendError:
        """Tries until there is an answer, an error that no retry mends, or no try left."""
        num_failures = 0
        while True:
            try:
                async with self._slots:
                    endpoint = await self._pool.next()
                    completion = await self._try(endpoint, request)
            except BackendError as error:
                return error
            except _HeldUp as error:
                self._pool.held_up(str(error))
            except _Failed as error:
                num_failures += 1
                if num_failures > self._config.retries:
                    return BackendError(f"{error}, {num_failures} times")
                await asyncio.sleep(backoff(num_failures))
            else:
                self._pool.got_answer()
                return completion

    async def _try(self, endpoint: Endpoint, request: Request) -> Completion:
        endpoint.num_waiting += 1
        try:
            # Over the whole answer: the client's own limit begins anew with every byte.
            async with asyncio.timeout(self._config.timeout_seconds):
                reply = await self._send(endpoint, request)
        except (TimeoutError, openai.APITimeoutError) as error:
            if _could_not_connect(error):
                endpoint.unreachable()
                raise _HeldUp("connection timed out") from error
            raise _Failed("server that did not answer in server.timeout_seconds") from error
        except openai.APIConnectionError as error:
            if _could_not_connect(error):
                endpoint.unreachable()
                raise _HeldUp(self._clean(error.__cause__)) from error
            raise _Failed("server that broke the connection off") from error
        except openai.APIStatusError as error:
            endpoint.answered()
            raise self._of_status(error, endpoint) from error
        except (openai.OpenAIError, ValueError) as error:
            raise _Failed("server that sent no valid answer") from error
        finally:
            endpoint.num_waiting -= 1
        endpoint.answered()
        return self._read(reply)

    async def _send(self, endpoint: Endpoint, request: Request) -> Any:
        sampling = request.sampling
        options: dict[str, Any] = {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.seed,
            "extra_body": self._config.extra_body,
        }
        if self._config.api == "chat":
            return await endpoint.client.chat.completions.create(
                messages=list(request.messages), **options
            )
        prompt = prompt_ids(self.tokenizer, request.messages)
        return await endpoint.client.completions.create(prompt=prompt, **options)

    def _read(self, reply: Any) -> Completion:
        """Reads the answer in a reply, any part of which may be missing."""
        choices = getattr(reply, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise _Failed("server that sent no valid answer")
        choice = choices[0]
        if self._config.api == "chat":
            text = getattr(getattr(choice, "message", None), "content", None)
        else:
            text = getattr(choice, "text", None)
        reason = getattr(choice, "finish_reason", None)
        if text is None and reason == "length":
            text = ""  # a model that thinks, and was cut before it came to an answer
        if not isinstance(text, str) or not isinstance(reason, str):
            raise _Failed("server that sent no valid answer")
        finished = reason not in ("length", "content_filter")
        return Completion(text=text.strip(), finished=finished)

    def _of_status(self, error: openai.APIStatusError, endpoint: Endpoint) -> Exception:
        """Returns the error that a status means for the request, or for the whole run."""
        status, detail = error.status_code, self._clean(error.message)
        if status in (401, 403):
            return UserError(
                f"server ({endpoint.url}): refuses the API key ({status}: {detail}); "
                f"{self._key_hint()}"
            )
        if status == 404:
            return UserError(
                f"server ({endpoint.url}): has no such path or model ({detail}); give URLs up to "
                "and with /v1, and the served name as server.model"
            )
        if status == 429:
            endpoint.pause(_retry_after(error) or backoff(1))
            return _HeldUp(f"429: {detail}")
        if status >= 500 or status in RETRIED:
            self._tell(status, detail)
            return _Failed(f"server that answered {status}")
        self._tell(status, detail)
        return BackendError(f"server that answered {status}")

    # ------------------------------------------------------------ messages

    def _tell(self, status: int, detail: str) -> None:
        """Prints what the server sent with a status, once for each status."""
        if str(status) not in self._told:
            self._told.add(str(status))
            print(f"warning: the server answered {status}: {detail}", file=sys.stderr)

    def _clean(self, text: object) -> str:
        """Returns one short line without the API key, which servers repeat in their refusals."""
        line = " ".join(str(text).split())
        return (line.replace(self._key, "***") if self._key else line)[:200]

    def _key_hint(self) -> str:
        name = self._config.api_key_env
        if self._key:
            return f"check the key in the environment variable {name}"
        return f"put a key into the environment variable {name} (server.api_key_env)"

    # ------------------------------------------------------------ before work

    def _served_model(self, urls: Sequence[str], options: dict[str, Any]) -> str:
        """Asks every endpoint for its models; returns the name to use in requests.

        Endpoints that cannot be reached are named in a warning and tried later; one must answer.
        """
        served: dict[str, list[str]] = {}
        missing: dict[str, str] = {}
        for url in urls:
            with openai.OpenAI(base_url=url, **options) as client:
                quick = client.with_options(timeout=CONNECT_SECONDS)
                try:
                    served[url] = [str(model.id) for model in quick.models.list()]
                except openai.APIConnectionError as error:
                    missing[url] = self._clean(error.__cause__ or error)
                except openai.APIStatusError as error:
                    if error.status_code in (401, 403):
                        raise UserError(
                            f"server ({url}): refuses the API key ({error.status_code}: "
                            f"{self._clean(error.message)}); {self._key_hint()}"
                        ) from error
                    served[url] = []  # a server without that list; the first request will tell
                except (openai.OpenAIError, ValueError, TypeError, AttributeError):
                    served[url] = []
        told = "; ".join(f"{url}: {reason}" for url, reason in missing.items())
        if not served:
            raise UserError(
                f"server ({told}): cannot be reached; start it, or correct server.endpoints"
            )
        if missing:
            print(f"warning: server endpoints not reached, tried later: {told}", file=sys.stderr)
        if self._config.model is not None:
            return self._config.model
        names = sorted({name for models in served.values() for name in models})
        if len(names) != 1:
            listed = ", ".join(names[:5]) or "it names none"
            raise UserError(f"server.model (null): say which model of the server's ({listed})")
        return names[0]


def _api_key(server: ServerConfig) -> str | None:
    return os.environ.get(server.api_key_env) or None


def _positions(path: str) -> int:
    """Reads the context length in the model's config, without its weights."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings)
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        raise UserError(
            f"context_length (null): {path} has no config that names its positions; set it to the "
            "context of the server's model"
        ) from error


def _could_not_connect(error: BaseException) -> bool:
    """Returns whether a request never reached a server.

    The client's HTTP library changes with its version, so its exceptions are known by name.
    """
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Reads the seconds of the header Retry-After; None if it is missing or a date."""
    try:
        return min(max(float(error.response.headers["retry-after"]), 0.0), 3600.0)
    except (KeyError, ValueError):
        return None
