"""The README of a Triton model repository: how to start the server, and how to ask it."""

from __future__ import annotations

from dataclasses import dataclass

# Cancellation came with 23.10; each release has Python 3.10 or newer.
FIRST_IMAGE = "23.10"


@dataclass(frozen=True)
class Facts:
    """name, kind (chat or embeddings), folder (of OUT), target: of the engine; plain: the name of
    the model without our code, or why there is none; engine: its path, if it was not copied.
    """

    name: str
    kind: str
    folder: str
    target: str
    on_card: bool
    channels: int
    pixels: tuple[int, int]
    plain: str | None
    why_not_plain: str
    engine: str | None


def text(facts: Facts) -> str:
    """The whole page."""
    asking = _EMBEDDINGS if facts.kind == "embeddings" else _CHAT
    parts = [_START.format(**_values(facts)), asking.format(**_values(facts))]
    if facts.kind == "embeddings":
        parts.append(_plain(facts))
    return "\n".join(parts)


def _values(facts: Facts) -> dict[str, str]:
    mount = f" \\\n  -v {facts.engine}:{facts.engine}:ro" if facts.engine else ""
    gpus = " --gpus all" if facts.on_card else ""
    return {
        "name": facts.name,
        "folder": facts.folder,
        "target": facts.target,
        "first": FIRST_IMAGE,
        "mount": mount,
        "gpus": gpus,
        "channels": str(facts.channels),
    }


def _plain(facts: Facts) -> str:
    if facts.plain is None:
        return f"There is no model without edgevlm's code: {facts.why_not_plain}.\n"
    height, width = facts.pixels
    return _WITHOUT.format(plain=facts.plain, height=height, width=width)


_START = """\
# {name} on Triton Inference Server

An engine of edgevlm for `{target}` as a model of Triton's Python backend.
**What is here was verified against the backend's documentation, not on a running server.**

`models/` is the model repository. It is served by NVIDIA's image, `{first}` or a later release in
place of YY.MM, with edgevlm installed in front of the server. (Where pip does not find edgevlm, put
its wheel into this folder and name that in requirements.txt.)

```
docker run --rm{gpus} --shm-size=1g -p 8000:8000 -p 8001:8001 -p 8002:8002 \\
  -v {folder}:/deployment:ro{mount} \\
  nvcr.io/nvidia/tritonserver:YY.MM-py3 sh -c \\
  'cd /deployment && pip install -r requirements.txt && tritonserver --model-repository=models'
```
"""
_CHAT = """\
| input | type | |
|---|---|---|
| `prompt` | BYTES [1] | the question; control tokens and `<image>` in it are text |
| `image` | BYTES [n], optional | files of images, or data URLs |
| `max_tokens` | INT32 [1], optional | longest answer |
| `temperature`, `top_p`, `top_k` | FP32, FP32, INT32 [1], optional | greedy without `temperature` |
| `seed` | INT64 [1], optional | makes sampling repeatable |
| `stop` | BYTES [n], optional | texts that end the answer |
| `stream` | BOOL [1], optional | one response for each token and one at the end; else one in all |

Outputs: `text` BYTES [1], `token_ids` INT32 [n], `finish_reason` BYTES [1], which is empty until
the last response, and `prompt_tokens` INT32 [1] of the last response. The model is decoupled: ask
it over gRPC's stream, or by the generate endpoints. A request that is cancelled ends before its
next token.

```
curl -s localhost:8000/v2/models/{name}/generate_stream \\
  -d '{{"prompt": "Why is the sky blue?", "max_tokens": 64, "stream": true}}'
```

```python
import queue
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc  # pip install 'tritonclient[grpc]'


def tensor(name, kind, array):
    found = grpc.InferInput(name, array.shape, kind)
    found.set_data_from_numpy(array)
    return found


image = Path("photo.jpg").read_bytes()
inputs = [
    tensor("prompt", "BYTES", np.array([b"What is in the image?"], object)),
    tensor("image", "BYTES", np.array([image], object)),
    tensor("stream", "BOOL", np.array([True])),
]
responses = queue.Queue()
with grpc.InferenceServerClient("localhost:8001") as client:
    client.start_stream(lambda result, error: responses.put((result, error)))
    client.async_stream_infer("{name}", inputs)
    while True:
        result, error = responses.get()
        if error:
            raise error
        print(result.as_numpy("text")[0].decode(), end="", flush=True)
        if result.as_numpy("finish_reason")[0]:
            break
```
"""
_EMBEDDINGS = """\
Input `image`: BYTES [batch, 1], files of images or data URLs. Output `embedding`: FP32
[batch, {channels}]. Requests are batched; an image that cannot be read fails its own request alone.

```python
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc  # pip install 'tritonclient[grpc]'

files = [Path(name).read_bytes() for name in ("a.jpg", "b.jpg")]
images = grpc.InferInput("image", [len(files), 1], "BYTES")
images.set_data_from_numpy(np.array(files, object)[:, None])
with grpc.InferenceServerClient("localhost:8001") as client:
    print(client.infer("{name}", [images]).as_numpy("embedding").shape)
```
"""
_WITHOUT = """\
`{plain}` is the same tower's graph on Triton's ONNX Runtime backend, without edgevlm's code:
`pixels` FP32 [batch, 3, {height}, {width}], preprocessed by the client, to `embedding`.
The image's ONNX Runtime must be as new as that which the engine was built for; remove the folder
where it is not.
"""
