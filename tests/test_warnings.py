"""What the optimizer warns of, and which line it blames."""

import functools
import linecache
import threading
import warnings

import pytest
import torch
from problems import factors, gradients_of_w, set_gradients
from test_construction import named

from lora_rite import LoRARite
from lora_rite.optim.guard import MAX_IDLE_IN_A_ROW


def changed():
    """An optimizer whose next step warns: a factor was changed from outside."""
    pair = [torch.nn.Parameter(x.float()) for x in factors(4, 9, 7)]
    optimizer = LoRARite(pair, lr=1e-2)
    set_gradients(*pair, gradients_of_w(1, 7, 9)[0].float())
    optimizer.step()
    with torch.no_grad():
        pair[0].mul_(2)
    return pair, optimizer


def direct(pair, optimizer):
    optimizer.step()  # the user's line


def closure(pair, optimizer):
    optimizer.step(lambda: 0.0)  # the user's line


def scheduled(pair, optimizer):
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    optimizer.step()  # the user's line
    scheduler.step()


def scaled(pair, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale((pair[1] @ pair[0]).sum()).backward()
    scaler.step(optimizer)  # the user's line


def accelerated(pair, optimizer):
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    prepared.step()  # the user's line


def wrapped_by_torch(pair, optimizer):
    step = torch.no_grad()(functools.partial(optimizer.step))
    step()  # the user's line


def compiled(pair, optimizer):
    torch.compile(optimizer.step, backend="eager")()  # the user's line


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", [direct, closure, scheduled, scaled, accelerated, wrapped_by_torch, compiled])
def test_a_warning_names_the_users_line(how):
    """However many frames of torch and accelerate lie between."""
    given = changed()
    with pytest.warns(UserWarning, match="were changed from outside") as caught:
        how(*given)
    (warning,) = [w for w in caught if "changed from outside" in str(w.message)]
    assert warning.filename == __file__
    assert "# the user's line" in linecache.getline(warning.filename, warning.lineno)


def test_a_warning_in_a_thread_of_the_optimizer_alone():
    """No line is the user's there: it is said all the same."""
    _, optimizer = changed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
    assert ["were changed from outside" in str(w.message) for w in caught] == [True]


def test_a_filter_on_the_users_module_holds():
    """As for any warning of that module."""
    _, optimizer = changed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module=__name__)
        optimizer.step()
    assert not caught


def step_counting_warnings(optimizer, steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step()
    return len([w for w in caught if "has had a gradient in" in str(w.message)])


def test_an_optimizer_without_gradients_says_so_once():
    """After so many steps in a row; a gradient begins the count anew; loading a state does too."""
    pair, head = named(), torch.nn.Parameter(torch.ones(3))
    optimizer = LoRARite([*pair, ("head", head)], lr=1e-2, adamw_lr=1e-2)
    assert step_counting_warnings(optimizer, MAX_IDLE_IN_A_ROW - 1) == 0
    head.grad = torch.zeros(3)
    assert step_counting_warnings(optimizer, 1) == 0
    head.grad = None
    assert step_counting_warnings(optimizer, MAX_IDLE_IN_A_ROW - 1) == 0
    assert step_counting_warnings(optimizer, 1) == 1
    assert step_counting_warnings(optimizer, 3 * MAX_IDLE_IN_A_ROW) == 0
    optimizer.load_state_dict(optimizer.state_dict())
    assert step_counting_warnings(optimizer, MAX_IDLE_IN_A_ROW) == 1


def test_one_gradient_is_enough():
    """Experts without tokens, phases in which all but one parameter are frozen, and lr 0 are no reason to warn."""
    q, k, head = named("q"), named("k"), torch.nn.Parameter(torch.ones(3))
    optimizer = LoRARite([*q, *k, ("head", head)], lr=0.0, adamw_lr=0.0)
    for params in ([p for _, p in k], [head]):
        optimizer.zero_grad()
        for p in params:
            p.grad = torch.zeros_like(p)
        assert step_counting_warnings(optimizer, 2 * MAX_IDLE_IN_A_ROW) == 0


def merged(model, config):
    return model.merge_and_unload().requires_grad_(True)


def deleted(model, config):
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.delete_adapter("default")
    return model


def exchanged(model, config):
    """As EVA does with layers whose rank it changes."""
    layer = model.base_model.model[0]
    layer.lora_A["default"], layer.lora_B["default"] = torch.nn.Linear(9, 3), torch.nn.Linear(3, 7)
    return model


@pytest.mark.parametrize("change", [merged, deleted, exchanged])
def test_an_adapter_that_is_no_longer_the_models_is_noticed(change):
    """The model trains on, and the optimizer has parameters of nobody. (The step before sets them to None.)"""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 5)), config)
    optimizer = LoRARite(model.named_parameters(), lr=1e-2)

    def step(net):
        optimizer.zero_grad()
        net(torch.ones(2, 9)).sum().backward()
        optimizer.step()

    step(model)
    left = change(model, config)
    for _ in range(MAX_IDLE_IN_A_ROW - 1):
        step(left)
    with pytest.warns(UserWarning, match="merge_and_unload, delete_adapter or an exchange of its layers"):
        step(left)
