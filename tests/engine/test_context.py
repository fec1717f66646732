"""What a thread is doing: one object, replaced and never changed; and who hears a module without hooks."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtc.engine.context import Call, Recording, bypassed, change, current, during, running_call
from vtc.engine.recorders import Recorder, listening_in


@pytest.fixture(autouse=True)
def _idle() -> Iterator[None]:
    yield
    assert not any(vars(current()).values())


def test_a_copied_context_goes_its_own_way() -> None:
    """Tasks and worker threads of client software start with a copy of the context that they were made in."""
    copied = contextvars.copy_context()
    with during(call=Call(owner := object())):
        assert running_call(owner) is current().call
        assert copied.run(running_call, owner) is None
        copied.run(change, bypassed=True)
        assert not current().bypassed
    assert copied.run(current).bypassed


def test_only_what_was_named_is_what_it_was() -> None:
    """A call that begins while models are bypassed goes on afterwards, also after an error."""
    call = Call(object())

    def interrupted() -> None:
        with bypassed():
            change(call=call)
            assert running_call(call.owner) is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert running_call(call.owner) is call
    assert running_call(object()) is None
    change(call=None)


class Doubled:
    """A signal: twice what the module returns."""

    reads = "output"

    def read(self, tower: Any, module: nn.Module, hidden: Tensor, heard: Any) -> Tensor:
        return 2 * hidden


def recorder(owner: Any, module: nn.Module) -> Recorder:
    return Recorder(owner, Doubled(), None, module)  # type: ignore[arg-type]


def test_a_listener_leaves_what_its_owner_does_not_record() -> None:
    module, one, other = nn.Linear(2, 2), object(), object()
    first, second = recorder(one, module), recorder(other, module)
    found, nothing = Recording(one, "image", {}), Recording(other, "image", {})
    with listening_in([first]):
        with listening_in([second]), during(recording=found):
            expected = module(torch.ones(1, 1, 2))
        assert list(found) == [first.signal]
        assert torch.equal(torch.cat(found[first.signal]), 2 * expected)
        with during(recording=nothing):
            module(torch.ones(1, 1, 2))
        assert not nothing
        assert "forward" in vars(module)
    assert "forward" not in vars(module)


def test_a_forward_that_somebody_put_there_meanwhile_stays() -> None:
    module, owner = nn.Linear(2, 2), object()
    nothing = Recording(owner, "image", {})
    mine = module.__dict__["forward"] = functools.partial(nn.Linear.forward, module)
    with listening_in([recorder(owner, module)]):
        pass
    assert module.forward is mine
    with listening_in([recorder(owner, module)]):
        heard = module.forward
        theirs = module.__dict__["forward"] = functools.wraps(heard)(lambda *args: heard(*args))
    assert module.forward is theirs
    with during(recording=nothing):
        module(torch.ones(1, 1, 2))
    assert not nothing
