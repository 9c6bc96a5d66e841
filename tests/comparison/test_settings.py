"""Which settings differ between runs."""

import pytest
from made_up import config
from omegaconf import OmegaConf

from split_lightning.runs.comparison import differing_settings
from split_lightning.runs.comparison.settings import flat_settings, short_names, shown


def flat(**changes):
    return flat_settings(OmegaConf.create(config("somewhere", **changes)))


def chosen(choices, **changes):
    return flat_settings(OmegaConf.create(config("somewhere", **changes)), choices)


def columns(*runs):
    keys = differing_settings(runs)
    return {key: [shown(run, key) for run in runs] for key in keys}


def test_a_key_that_passes_another_on_is_no_column():
    assert columns(flat(lr=0.01), flat(lr=0.1)) == {
        "optimizer.client.lr": ["0.01", "0.1"]
    }


def test_values_are_compared_resolved():
    """`${seed}` in the one and 3 in the other are no difference; 4 is one."""
    assert columns(flat(seed=3, own="${seed}"), flat(seed=3, own=3)) == {}
    assert columns(flat(seed=3, own="${seed}"), flat(seed=3, own=4)) == {
        "own": ["3", "4"]
    }


def test_where_a_run_is_and_went_on_from_is_no_setting():
    one = config("one")
    two = config("two", ckpt_path="x.ckpt")
    runs = [flat_settings(OmegaConf.create(cfg)) for cfg in (one, two)]
    assert differing_settings(runs) == []


def test_an_object_is_one_column_and_its_own_options_none():
    """Alpha belongs to the class; it is a column where it differs by itself."""
    dirichlet = {"_target_": "flwr.DirichletPartitioner", "alpha": 0.5}
    one, two = flat(), flat(data={"partitioner": dirichlet})
    names = ["IidPartitioner", "DirichletPartitioner"]
    assert columns(one, two) == {"data.partitioner": names}
    three = flat(data={"partitioner": {**dirichlet, "alpha": 0.1}})
    assert columns(one, two, three) == {
        "data.partitioner": [*names, "DirichletPartitioner"],
        "data.partitioner.alpha": ["", "0.5", "0.1"],
    }


SPLIT = {"_target_": "RoundRobin", "shuffle": False}
UNSPLIT = {"_target_": "Centralized"}


def test_a_group_of_another_class_is_one_column():
    """That the unsplit network has no turns, its class tells."""
    one, two = flat(protocol=SPLIT), flat(protocol=UNSPLIT)
    assert columns(one, two) == {"protocol": ["RoundRobin", "Centralized"]}
    shuffled = flat(protocol={**SPLIT, "shuffle": True})
    assert columns(one, shuffled) == {"protocol.shuffle": ["false", "true"]}
    short = flat(protocol={**SPLIT, "local_steps": 5})
    assert columns(one, short) == {"protocol.local_steps": ["", "5"]}
    # The class does not tell which run lacks it: one with the same class has it.
    assert set(columns(one, two, short)) == {"protocol", "protocol.local_steps"}


def test_a_choice_stands_for_all_that_its_file_holds():
    """Whether the file holds another class, another option, or a key more."""
    one = chosen({"protocol": "round_robin"}, protocol=SPLIT)
    two = chosen({"protocol": "centralized"}, protocol=UNSPLIT)
    assert columns(one, two) == {"protocol": ["round_robin", "centralized"]}
    kind = {"_target_": "flwr.DirichletPartitioner", "alpha": 0.5}
    three, four = (
        chosen(
            {"data/partitioner": name}, data={"partitioner": {**kind, "alpha": alpha}}
        )
        for name, alpha in (("dirichlet", 0.5), ("dirichlet_01", 0.1))
    )
    assert columns(three, four) == {"data/partitioner": ["dirichlet", "dirichlet_01"]}


def test_what_differs_under_the_same_choice_is_a_column_of_its_own():
    shuffled = {**SPLIT, "shuffle": True}
    runs = [
        chosen({"protocol": "round_robin"}, protocol=SPLIT),
        chosen({"protocol": "round_robin"}, protocol=shuffled),
        chosen({"protocol": "centralized"}, protocol=UNSPLIT),
    ]
    assert columns(*runs) == {
        "protocol": ["round_robin", "round_robin", "centralized"],
        "protocol.shuffle": ["false", "true", ""],
    }


def test_a_choice_that_not_all_runs_tell_is_left_out():
    runs = [chosen({"protocol": "x"}, protocol=SPLIT), flat(protocol=UNSPLIT)]
    assert columns(*runs)["protocol._target_"] == ["RoundRobin", ""]


def test_another_class_under_the_same_choice_is_a_column():
    other = {"_target_": "my.Own", "turns": 3}
    runs = [chosen({"protocol": "x"}, protocol=own) for own in (SPLIT, other)]
    assert columns(*runs) == {"protocol._target_": ["RoundRobin", "Own"]}


def test_a_choice_without_a_place_of_its_own_is_no_setting():
    runs = [chosen({"experiment": name, "hydra/help": name}) for name in ("a", "b")]
    assert columns(*runs) == {}


def test_what_a_run_shows_is_no_setting():
    shows = {"enable_progress_bar": False, "enable_model_summary": True, "devices": 1}
    other = {"enable_progress_bar": True, "enable_model_summary": False, "devices": 2}
    assert columns(flat(trainer=shows), flat(trainer=other)) == {
        "trainer.devices": ["1", "2"]
    }


def test_null_against_an_object():
    scheduler = {"_target_": "torch.StepLR", "step_size": 3}
    assert columns(flat(own=None), flat(own=scheduler)) == {"own": ["null", "StepLR"]}


def test_a_key_that_only_one_run_has_is_a_column():
    assert columns(flat(), flat(own=True)) == {"own": ["", "true"]}


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_to_lack_a_key_is_to_have_nothing_there(nothing):
    """A key that came with a later version is no difference while it is not used."""
    assert columns(flat(), flat(own=nothing)) == {}


@pytest.mark.parametrize("value", ["${hydra:runtime.output_dir}", "${nowhere}", "???"])
def test_what_cannot_be_resolved_is_compared_as_written(value):
    assert columns(flat(own=value), flat(own=1)) == {"own": [value, "1"]}


def test_lists_and_numbers_are_compared_by_value():
    assert columns(flat(own=[1, 2]), flat(own=[1, 3])) == {"own": ["[1, 2]", "[1, 3]"]}
    close = columns(flat(lr=0.012345678), flat(lr=0.012345679))
    assert list(close) == ["optimizer.client.lr"]  # though shown alike


def test_a_run_without_configuration_is_left_out_of_account():
    assert differing_settings([flat(), {}]) == []


def test_short_names_tell_keys_apart():
    keys = ["data.alpha", "a.lr", "b.a.lr", "lr"]
    assert list(short_names(keys).values()) == ["alpha", "a.lr", "b.a.lr", "lr"]
