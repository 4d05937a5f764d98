"""The shipped demo base: small, loadable offline, and no good at the tasks by itself."""

from __future__ import annotations

import pytest

from multigraft.demo import RECIPE, TASKS, examples, model_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(model_path())


def test_everything_is_there_and_small():
    names = {path.name for path in model_path().iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (model_path() / "model.safetensors").stat().st_size <= 8_000_000


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_prompt_and_completion_meet_at_a_token_boundary(tokenizer, task):
    for one in examples(task, "heldout", 100):
        prompt, completion = (tokenizer(text)["input_ids"] for text in (one.prompt, one.completion))
        assert prompt + completion == tokenizer(one.prompt + one.completion)["input_ids"]
        assert tokenizer.decode(prompt + completion) == one.prompt + one.completion
        assert len(completion) + 1 <= RECIPE.max_new_tokens


def test_the_chat_template_renders_the_tasks_prompt(tokenizer):
    pytest.importorskip("jinja2")
    text = "4 July 2016"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == TASKS[0].prompt.format(text=text)


def test_the_base_does_not_solve_the_tasks(tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    assert model.dtype == torch.float32
    cases = [one for task in TASKS for one in examples(task, "heldout", 20)]
    batch = tokenizer([one.prompt for one in cases], return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=RECIPE.max_new_tokens, do_sample=False)
    answers = tokenizer.batch_decode(
        ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [one for one, answer in zip(cases, answers, strict=True) if answer == one.completion]
    assert len(right) < 0.05 * len(cases)
