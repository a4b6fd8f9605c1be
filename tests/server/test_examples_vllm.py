"""The context before each trained turn, against vLLM's own path from an HTTP request to prompt token ids."""

import json
import os
from typing import Any
from unittest import mock

import pytest
from examples_parts import DATA, TEMPLATES, builder, runs
from test_examples import TRIP, WEATHER

from producer.transcript import Transcript

TOOLS = [
    WEATHER,
    {"type": "function", "function": {"strict": True, "description": "Löscht", "name": "f", "unknown": 1}, "other": 2},
]
ARGUMENTS = '{"a": [1, {"b": null}], "c": true, "d": "é"}'
NESTED = {"role": "assistant", "content": "", "tool_calls": []}
NESTED["tool_calls"] = [
    {
        "id": "x",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": [1, {"b": null}], "c": true, "d": "é"}'},
    },
    {"id": "y", "type": "function", "function": {"name": "g", "arguments": ""}},
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "tools": {"messages": TRIP, "tools": TOOLS},
    "no tools": {"messages": TRIP},
    "nested arguments": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
            NESTED,
            {"role": "tool", "content": [{"type": "text", "text": "done"}], "tool_call_id": "x"},
            {"role": "assistant", "content": [{"type": "text", "text": "Fine."}]},
        ],
        "tools": TOOLS,
    },
    "control tokens": {
        "messages": [
            {"role": "system", "content": "<|endoftext|>"},
            {"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\n x </think> e\u0301"},
            {"role": "assistant", "content": "It is <|im_end|>, see"},
            {"role": "user", "content": "<tool_response> no"},
            {"role": "assistant", "content": "Bye"},
        ]
    },
    "template arguments": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3,
        "chat_template_kwargs": {"preserve_thinking": True, "enable_thinking": True, "unheard_of": 1},
    },
}


@pytest.fixture(scope="module")
def server_prompt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(template, request body) -> the ids vLLM would prompt the model with."""
    from packaging.version import Version

    from worker.testing.tiny_model import make_tiny
    from worker.utils.supported_versions import VersionError, check_versions
    from worker.utils.torch_setup import prepare

    prepare()
    try:
        version = check_versions("vllm")["vllm"]
    except VersionError as error:
        pytest.skip(str(error))
    if Version(version) < Version("0.32"):
        pytest.skip(f"vLLM {version} does not go with transformers' Qwen3.5 in one process")
    from vllm.config import ModelConfig, VllmConfig
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.hf import HfRenderer
    from vllm.tokenizers import get_tokenizer

    folder = str(make_tiny(tmp_path_factory.mktemp("vllm") / "tiny"))
    with mock.patch.dict(os.environ):  # a config of vLLM sets variables for its processes: none for other tests
        renderer = HfRenderer(
            VllmConfig(model_config=ModelConfig(model=folder, max_model_len=4096)), get_tokenizer(folder)
        )

    def render(template: str, body: dict[str, Any]) -> list[int]:
        request = ChatCompletionRequest.model_validate(json.loads(json.dumps({"model": "m"} | body)))
        tools = [tool.model_dump() for tool in request.tools] if request.tools else None
        params = request.build_chat_params(template, "auto").with_defaults({"tools": tools, "tokenize": True})
        _, prompt = renderer.render_messages(request.messages, params)
        return prompt["prompt_token_ids"]

    return render


def check(server_prompt: Any, template: str, body: dict[str, Any]) -> list[int]:
    """Compare every turn's context; a request carries what a client would send: messages as they were logged."""
    transcript = Transcript(**body)
    example = builder(template).build(transcript, "t")
    turns = [i for i, message in enumerate(transcript.messages) if message["role"] == "assistant"]
    for (context, _), index in zip(runs(example), turns, strict=True):
        thinking = {"enable_thinking": bool(transcript.messages[index].get("reasoning_content"))}
        request = body | {
            "messages": body["messages"][:index],
            "chat_template_kwargs": thinking | body.get("chat_template_kwargs", {}),
        }
        assert context == server_prompt(template, request), f"turn {index}"
    return turns


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_context_is_vllms_prompt(server_prompt: Any, name: str, conversation: str) -> None:
    assert len(check(server_prompt, TEMPLATES[name], CONVERSATIONS[conversation])) >= 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_conversations(server_prompt: Any, name: str) -> None:
    for line in (DATA / "transcripts.jsonl").read_text().splitlines():
        assert check(server_prompt, TEMPLATES[name], {"messages": json.loads(line)["messages"]}) == [1, 3]
