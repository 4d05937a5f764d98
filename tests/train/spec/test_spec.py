"""A run's file is read strictly, and a mistake is told with its place and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from multigraft import ConfigError, IA3Config, LoraConfig
from multigraft.train.spec import expanded, job_of, read_run, run_of

LEAST = {"model": "base", "output": "out", "data": "rows.jsonl"}


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_least_file_is_one_adapter_with_the_usual_recipe(tmp_path):
    job = job_of(read_run(written(tmp_path, "model: base\noutput: out\ndata: rows.jsonl\n")))
    (adapter,) = job.adapters
    assert (job.model, job.output, adapter.name, adapter.data) == (
        "base",
        "out",
        "default",
        "rows.jsonl",
    )
    assert isinstance(adapter.config, LoraConfig)
    assert (adapter.config.r, adapter.config.lora_alpha) == (16, 32)
    assert adapter.recipe == type(adapter.recipe)()


def test_a_number_with_an_exponent_is_a_number(tmp_path):
    text = "model: base\noutput: out\ndata: d\nlr: 1e-4\nwarmup: 1E+2\n"
    run = read_run(written(tmp_path, text))
    assert (run.lr, run.warmup) == (1e-4, 100.0)


def test_what_stands_at_the_top_is_the_default_of_every_adapter():
    run = run_of(
        {
            **LEAST,
            "rank": 4,
            "lr": 0.5,
            "adapters": [{"name": "a"}, {"name": "b", "rank": 8, "data": "other.jsonl"}],
        }
    )
    first, second = job_of(run).adapters
    assert (first.config.r, first.recipe.lr, first.data) == (4, 0.5, "rows.jsonl")
    assert (second.config.r, second.recipe.lr, second.data) == (8, 0.5, "other.jsonl")


def test_a_flag_wins_over_the_file_for_every_adapter():
    run = run_of({**LEAST, "adapters": [{"name": "a", "lr": 0.5}, {"name": "b"}]}, {"lr": 0.1})
    assert [adapter.recipe.lr for adapter in job_of(run).adapters] == [0.1, 0.1]


def test_a_sweep_is_an_adapter_for_every_combination():
    run = run_of({**LEAST, "sweep": {"rank": [4, 8], "lr": [1e-4, 2e-4]}})
    found = [(keys.name, keys.rank, keys.lr) for keys in expanded(run)]
    assert found == [
        ("rank4-lr0.0001", 4, 1e-4),
        ("rank4-lr0.0002", 4, 2e-4),
        ("rank8-lr0.0001", 8, 1e-4),
        ("rank8-lr0.0002", 8, 2e-4),
    ]


def test_a_sweep_over_a_list_of_adapters_multiplies_it():
    run = run_of({**LEAST, "adapters": [{"name": "a"}, {"name": "b"}], "sweep": {"seed": [0, 1]}})
    assert [keys.name for keys in expanded(run)] == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]


def test_other_methods_and_fields_of_their_configs():
    run = run_of({**LEAST, "method": "ia3", "config": {"feedforward_modules": ["down_proj"]}})
    config = job_of(run).adapters[0].config
    assert isinstance(config, IA3Config)
    assert set(config.feedforward_modules) == {"down_proj"}
    run = run_of({**LEAST, "config": {"use_dora": True, "init_lora_weights": "pissa"}})
    config = job_of(run).adapters[0].config
    assert config.use_dora and config.init_lora_weights == "pissa"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1}, r"`lerning_rate` is no key of a run."),
        ({"batchsize": 1}, r"`batchsize` is no key of a run. Nearest: `batch_size`"),
        ({"adapters": [{"name": "a", "rnk": 4}]}, r"`adapters\[0\].rnk` is no key.*`rank`"),
        ({"adapters": [{"rank": 4}]}, r"`adapters\[0\].name` is missing"),
        ({"adapters": [{"name": "a", "dtype": "x"}]}, r"key of the whole run: give it at the top"),
        ({"rank": "8"}, r"`rank` \(='8'\): input should be a valid integer"),
        ({"rank": 8.5}, r"`rank` \(=8.5\)"),
        ({"packing": "yes"}, r"`packing` \(='yes'\): input should be a valid boolean"),
        ({"adapters": {"a": {}}}, r"`adapters` .*valid list"),
        ({"output": None}, r"`output` \(=None\)"),
    ],
)
def test_a_mistake_names_its_place_and_the_remedy(values, message):
    with pytest.raises(ConfigError, match=message):
        run_of({**LEAST, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": None}, "adapter `default` has no `data`"),
        ({"method": "lra"}, r"`method` \(='lra'\) is unknown.* Nearest: `lora`"),
        ({"method": "ia3", "rank": 4}, r"`rank` \(=4\): ia3 has nothing of the kind"),
        ({"config": {"use_dorra": True}}, "has no field `use_dorra`.* Nearest: `use_dora`"),
        ({"sweep": {"rnk": [1]}}, "`sweep`: `rnk` is no key to sweep over. Nearest: `rank`"),
        ({"sweep": {"name": ["a"]}}, r"`name` is no key to sweep over\.(?! Nearest: `name`)"),
        ({"config": {"peft_type": "IA3"}}, r"`peft_type` \(=IA3\) is another .*Leave it out"),
        ({"sweep": {"rank": []}}, "`rank` has no values"),
        ({"sweep": {"rank": [4, "8"]}}, r"`sweep`: `rank` \(='8'\)"),
        ({"sweep": {"seed": list(range(300))}}, "300 adapters are more than 256"),
        ({"task": "casual-lm"}, "Nearest: `causal-lm`"),
        ({"patience": 3}, "say with `eval_every`"),
        ({"eval_every": 0}, r"`eval_every` \(=0\)"),
        ({"schedule": "cosin"}, "Nearest: `cosine`"),
    ],
)
def test_a_value_that_does_not_fit_is_told_before_anything_is_read(values, message):
    with pytest.raises(Exception, match=message):
        job_of(run_of({**LEAST, **values}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "line 1: this is no YAML .the key `model` is given twice"),
        ("model: [a\n", "line 2: this is no YAML"),
        ("- a\n- b\n", "a run is keys and values"),
        ("", "a run is keys and values"),
        ("a: !!python/object/apply:os.system [echo]\n", "this is no YAML"),
    ],
)
def test_a_file_that_is_no_run_is_told_with_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_run(written(tmp_path, text))


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"nope.yaml: the file cannot be read"):
        read_run(tmp_path / "nope.yaml")


def test_what_stands_at_the_top_passes_by_methods_that_lack_it():
    run = run_of({**LEAST, "rank": 4, "adapters": [{"name": "a"}, {"name": "b", "method": "ia3"}]})
    first, second = job_of(run).adapters
    assert (first.config.r, str(second.config.peft_type)) == (4, "IA3")
    with pytest.raises(ConfigError, match=r"adapter `b`: `rank` \(=8\): ia3 has nothing"):
        job_of(
            run_of(
                {**LEAST, "adapters": [{"name": "a"}, {"name": "b", "method": "ia3", "rank": 8}]}
            )
        )


def test_a_mistake_in_one_of_several_names_the_adapter():
    with pytest.raises(ConfigError, match=r"adapter `b`: .*`lr` \(=-1.0\)"):
        job_of(run_of({**LEAST, "adapters": [{"name": "a"}, {"name": "b", "lr": -1.0}]}))


def test_swept_values_that_make_no_short_name_go_by_their_number():
    values = [{"use_dora": True}, {"use_dora": False}]
    run = run_of({**LEAST, "sweep": {"config": values, "target_modules": ["q_proj", "." * 80]}})
    names = [keys.name for keys in expanded(run)]
    assert names[:2] == ["config1-target_modulesq_proj", "config1-target_modules2"]
    with pytest.raises(ConfigError, match="`rank` has the value 4 twice"):
        expanded(run_of({**LEAST, "sweep": {"rank": [4, 4]}}))
