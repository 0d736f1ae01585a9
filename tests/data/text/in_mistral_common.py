"""What Mistral's own package makes of conversations, for test_mistral_common.py.

    PYTHONPATH=.venv/mistral_common python tests/data/text/in_mistral_common.py < conversations

Reads `{"version": "v1", "conversations": [[question, answer, question, ...], ...]}`, of which each
ends with a question or an answer, and writes `{"model": path, "ids": [[...], ...]}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

MODELS = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
}


def main() -> None:
    asked = json.load(sys.stdin)
    tokenizer = getattr(MistralTokenizer, asked["version"])()
    ids = []
    for texts in asked["conversations"]:
        kinds = [UserMessage, AssistantMessage] * len(texts)
        messages = [kind(content=text) for kind, text in zip(kinds, texts, strict=False)]
        ids.append(
            tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        )
    data = Path(mistral_common.__file__).parent / "data"
    json.dump({"model": str(data / MODELS[asked["version"]]), "ids": ids}, sys.stdout)


if __name__ == "__main__":
    main()
