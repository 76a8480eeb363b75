"""Ask a running server about a picture; the answer is printed as it comes.

edgevlm serve engine
python -m examples.ask_server photo.jpg "What is in the image?"
"""

from __future__ import annotations

import base64
import mimetypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai import OpenAI

SERVER = "http://127.0.0.1:8000"


def data_url(image: Path) -> str:
    """The file as a data URL: the server opens no files and fetches no addresses."""
    kind = mimetypes.guess_type(image)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def ask(image: Path, question: str, server: str = SERVER, max_tokens: int = 200) -> Iterator[str]:
    """The pieces of the answer, as they come."""
    parts: Any = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": question},
    ]
    with OpenAI(base_url=f"{server}/v1", api_key="none") as client:
        model = client.models.list().data[0].id  # the one that is served
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": parts}],
            max_tokens=max_tokens,
            stream=True,
        )
        for chunk in stream:
            yield chunk.choices[0].delta.content or "" if chunk.choices else ""


def main() -> None:
    """Print the answer to the question on the command line."""
    if len(sys.argv) not in (3, 4):
        sys.exit(f'python -m examples.ask_server IMAGE "QUESTION" [{SERVER}]')
    image, question, server = [*sys.argv[1:], SERVER][:3]
    for piece in ask(Path(image), question, server):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
