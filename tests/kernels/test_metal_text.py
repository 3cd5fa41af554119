"""Every kernel's text: equal to what MLX itself generates, and free of what Apple's compiler
refuses.
"""

import pytest
from catalogue import launches
from harness import emulator_only
from msl.lint import lint
from msl.wrapper import dtype_name, text_for, text_from_mlx

LAUNCHES = launches()
# Row tiles change a number, and how wide the loads are: the widest are linted.
LINTED = [name for name, one in LAUNCHES.items() if dict(one.template).get("TM", 32) == 32]


def signature(launch):
    inputs = [(tuple(array.shape), dtype_name(array.dtype)) for array in launch.inputs]
    return inputs, [dtype_name(dtype) for dtype in launch.output_dtypes]


@pytest.mark.parametrize("name", list(LAUNCHES))
def test_wrapper_is_what_mlx_generates(name):
    launch = LAUNCHES[name]
    ours = text_for(launch.body, *signature(launch), launch.template).text
    theirs = text_from_mlx(
        launch.body, launch.inputs, launch.output_shapes, launch.output_dtypes, launch.template
    )
    assert ours.strip() == theirs.strip()


@emulator_only
@pytest.mark.parametrize("name", LINTED)
def test_lint_is_clean(name):
    launch = LAUNCHES[name]
    assert lint(launch.body, *signature(launch), launch.template) == []
