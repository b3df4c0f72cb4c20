"""Backbones: a frozen causal language model and its tokenizer, from the package, a folder or the hub; never an adapter.

Nothing here unpickles a file or runs code that came with a model.
"""

import functools
import importlib.resources
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedmpi.errors import ModelError
from fedmpi.models import Config, quantized

T = TypeVar("T")
BUILTIN = "builtin:"
HUB_S = 5.0
UNREACHABLE = (socket.gaierror, ConnectionError, TimeoutError)
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError, SafetensorError)


def base_of(config: Config) -> str:
    """Where transformers finds the model: an existing local folder, or a hub id."""
    if config.path.startswith(BUILTIN):
        return str(_builtin(config.path))
    path = Path(config.path).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or not _may_be_hub_id(config.path):
        raise ModelError(f"model.path {config.path} is no folder: give a folder with *.safetensors, a hub id, or builtin:tiny")
    return config.path


def public_name(config: Config) -> str:
    """The model's name as others may read it: never a path of this machine."""
    if config.path.startswith(BUILTIN) or not Path(base_of(config)).is_dir():
        return config.path
    return Path(config.path).expanduser().resolve().name


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Without a pad token it pads with EOS: embeddings are never resized."""
    base = base_of(config)
    options = {"local_files_only": _is_here(base), "trust_remote_code": False}
    tokenizer = _attempt("tokenizer", config, lambda: AutoTokenizer.from_pretrained(base, **options))
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {config.path} has no end-of-sequence token: set eos_token in it, or responses cannot end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: Config, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The backbone, frozen, in evaluation mode, on the device."""
    base = base_of(config)
    if Path(base).is_dir():
        _check_folder(Path(base), config.path)
    options: dict[str, Any] = {"local_files_only": _is_here(base), "trust_remote_code": False, "use_safetensors": True}
    # Sizes that differ are let through here, so that the check below names them in one line.
    dtype = dtype_of(config, device)
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= quantized.loading(config, dtype, device)
    with _quiet():
        model, info = _attempt("model", config, lambda: AutoModelForCausalLM.from_pretrained(base, **options))
    if wrong := sorted(info["missing_keys"]) + sorted(key[0] for key in info["mismatched_keys"]):
        raise ModelError(f"model.path {config.path} lacks {len(wrong)} weights, or their shape differs: {', '.join(wrong[:3])}")
    model.name_or_path = public_name(config)
    model.requires_grad_(False).eval()
    quantized.keep_as_loaded(model)
    return model if config.quantization != "none" else model.to(device)  # quantised it is there, and may not be moved


def load_in_full(config: Config) -> PreTrainedModel:
    """The same model, what was quantised in the number format of the rest: products that are added to it are not rounded away."""
    model = load_model(config)
    with _quiet():
        return model if config.quantization == "none" else model.dequantize()


def load_shapes(config: Config, device: str = "cpu") -> PreTrainedModel:
    """The backbone from its config.json alone: names, shapes and number format, no memory."""
    base = base_of(config)
    options: dict[str, Any] = {"local_files_only": Path(base).is_dir(), "trust_remote_code": False}
    with _quiet(), torch.device("meta"):
        settings = _attempt("config.json", config, lambda: AutoConfig.from_pretrained(base, **options))
        dtype = dtype_of(config, "cpu" if device == "auto" else device)
        model = _attempt("shape", config, lambda: AutoModelForCausalLM.from_config(settings, dtype=dtype))
    model.name_or_path = public_name(config)
    return model.requires_grad_(False).eval()


def _builtin(path: str) -> Path:
    names = importlib.resources.files("fedmpi.models")
    folder = Path(str(names.joinpath(path.removeprefix(BUILTIN))))
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path {path} is not in the package: the built-in model is builtin:tiny")
    return folder


def _may_be_hub_id(path: str) -> bool:
    return not path.startswith(("/", ".", "~")) and path.count("/") <= 1 and not path.endswith("/")


def _is_here(base: str) -> bool:
    """Whether all that is needed lies on this machine. The hub's client would try again for a minute before it says so."""
    if Path(base).is_dir() or not (why := _hub_is_silent()):
        return Path(base).is_dir()
    if not isinstance(huggingface_hub.try_to_load_from_cache(base, "config.json"), str):
        raise ModelError(
            f"model.path {base} is no folder here, and the hub cannot be reached ({why}): check the path, or the network"
        )
    return True


@functools.cache
def _hub_is_silent() -> str:
    """Why the hub gives no answer at all; nothing where it gives one, be it a refusal."""
    try:
        urllib.request.urlopen(urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=HUB_S).close()
    except urllib.error.URLError as error:
        return str(error.reason) if isinstance(error.reason, UNREACHABLE) else ""
    except OSError as error:
        return str(error)
    return ""


def dtype_of(config: Config, device: str | torch.device) -> torch.dtype:
    """The number format on that device: what `auto` means there."""
    names = {"auto": torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16}
    return names.get(config.dtype) or getattr(torch, config.dtype)


def _check_folder(folder: Path, name: str) -> None:
    """Say what is wrong with a folder before transformers guesses at it."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model.path {name} has no config.json: it is not a model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {name}: config.json cannot be read: {error}") from None
    if "auto_map" in settings:
        raise ModelError(f"model.path {name} brings its own code (auto_map in config.json), which is never run: take another model")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        found = (
            f"only pickled weights ({pickled[0]}), which are never opened: convert them"
            if pickled
            else "no weights: expected *.safetensors"
        )
        raise ModelError(f"model.path {name} has {found}")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers between the lines of a rank's own log."""
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)


def _attempt(what: str, config: Config, load: Callable[[], T]) -> T:
    """Turn the many ways in which loading fails into one line."""
    try:
        return load()
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the {what} of model.path {config.path} cannot be loaded: {type(error).__name__}: {reason}; see that it is whole"
        ) from None


def repeated_layers(model: Any) -> Any:
    """The longest list of modules of a model, nothing where it has none."""
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module))
    return max(lists, key=len, default=None)


def decoder_layers(model: Any) -> Any:
    """The repeated layers of a decoder."""
    layers = repeated_layers(model)
    if layers is None:
        raise ModelError(
            f"{type(model).__name__} has no list of repeated layers (a torch.nn.ModuleList): no decoder that this program knows"
        )
    return layers
