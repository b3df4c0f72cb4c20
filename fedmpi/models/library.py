"""peft, without what it brings along: it and accelerate import optional packages wherever they are installed, needed or not.

bitsandbytes alone is a quarter of a rank's start and 200 MB of its memory, and both say on stderr that a machine has no GPU. What
is asked for is imported all the same: by a quantised base, an 8-bit optimiser, the engine deepspeed. This module must never know
which model is loaded.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = ("bitsandbytes", "deepspeed")


@contextmanager
def without_optional() -> Iterator[None]:
    """For a while these packages seem not to be installed, unless somebody uses them already."""
    hidden = [name for name in OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is Python's own word for: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        from peft import import_utils  # what it has found it remembers

        import_utils.is_bnb_available.cache_clear()
        import_utils.is_bnb_4bit_available.cache_clear()


import accelerate.utils  # noqa: E402, F401  # it notes once what there is, for transformers' Trainer too: before anything is hidden

with without_optional():
    import peft as peft
    from peft import PeftModel as PeftModel
    from peft import get_peft_model as get_peft_model
    from peft import get_peft_model_state_dict as get_peft_model_state_dict
