"""Settings from YAML: exact values, and one clear sentence for every mistake."""

import pytest

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.training.config import TrainConfig, read_settings, read_yaml


def read(**values):
    return read_settings(TrainConfig, values, "train")


def test_values_are_read_and_written_back_equal():
    given = {
        "images": 1000, "batch": 16, "optimiser": {"name": "adamw", "lr": 1e-3}, "averages": ["power:width=0.1"],
        "clip": 1, "times": "logit-normal:mean=0.5", "drop": 0,
    }  # fmt: skip
    config = read(**given)
    assert config.clip == 1.0 and isinstance(config.clip, float) and config.averages == ("power:width=0.1",)
    assert read_settings(TrainConfig, config.to_dict(), "train") == config
    assert config.total == 1008


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("shift: 1e-1\nimages: 1_000\n")
    assert read_settings(TrainConfig, read_yaml(path), "train").shift == 0.1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer": "adamw"}, "unknown setting in train 'optimizer': did you mean 'optimiser'"),
        ({"optimiser": "adanw"}, "unknown optimiser 'adanw': did you mean 'adamw'"),
        ({"optimiser": "adamw:rl=1e-3"}, "unknown optimiser adamw setting 'rl': did you mean 'lr'"),
        ({"schedule": "cosin:total=5"}, "did you mean 'cosine'"),
        ({"averages": ["powr"]}, "did you mean 'power'"),
        ({"times": "logitnormal"}, "did you mean 'logit-normal'"),
        ({"precision": "bf-16"}, "did you mean 'bf16'"),
        ({"parallel": "fdsp"}, "did you mean 'fsdp'"),
        ({"images": "many"}, "train.images must be a whole number; got 'many'"),
        ({"images": True}, "train.images must be a whole number; got True"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"micro_batch": 0}, "micro_batch must be at least 1; got 0"),
        ({"compile": "yes please"}, "train.compile must be true or false"),
        ({"clip": "tight"}, "train.clip must be a number; got 'tight'"),
        ({"clip": -1.0}, "clip must be above 0"),
        ({"drop": 1.5}, "drop is a share of the conditions"),
        ({"averages": "power"}, "train.averages must be a list"),
    ],
)
def test_mistakes_are_one_sentence(values, sentence):
    with pytest.raises(UserError) as caught:
        read(**values)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(UserError, match="train must hold settings as key: value"):
        read_settings(TrainConfig, ["images"], "train")


def test_bad_files_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="could not read .*nowhere.yaml: No such file"):
        read_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: 1\nb: [1,\nc: 2\n")
    with pytest.raises(UserError, match="is not valid YAML in line"):
        read_yaml(tmp_path / "bad.yaml")


def test_unknown_names_keep_what_is_known():
    with pytest.raises(UnknownName) as caught:
        read(precision="int3")
    assert set(caught.value.known) == {"fp32", "bf16"}
