"""A stand-in for a class of transformers that can't be loaded here."""

from typing import Any


class Processor:
    """What QwenImage21Pipeline asks of a Qwen3VLProcessor for text: the real one needs torchvision.

    `apply_chat_template` gives a system message as the published chat template does.
    """

    def __init__(self, words: Any) -> None:
        self.tokenizer = words

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)

    def apply_chat_template(self, messages: Any, **_: Any) -> list[list[int]]:
        [message] = messages
        [content] = message["content"]
        text = f"<|im_start|>{message['role']}\n{content['text']}<|im_end|>\n"
        return [self.tokenizer(text).input_ids]
