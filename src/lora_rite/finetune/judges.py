"""lm_eval's tasks, which judge a model's choices and answers."""

import logging
from pathlib import Path
from typing import Any

from ..errors import LoRARiteValueError
from ..inputs import blame
from .tasks import TASKS, Row, Rows, Task, require_rows

#: The seed of lm_eval's choice of few-shot examples, which is lm_eval's own.
FEWSHOT_SEED = 1234


def task_judge(
    name: str, task: Task, rows: Rows, data_dir: Path | None, num_fewshot: int | None
) -> tuple[Any, list[Row]]:
    """lm_eval's task of that name, as it is, on our rows; and the rows that it takes few-shot examples from."""
    TaskManager, root = lm_eval_tasks()
    from datasets import Dataset, DatasetDict

    manager = TaskManager(include_path=root / name.partition("_")[0], include_defaults=False)
    shots = (manager.task_index[name].cfg.get("num_fewshot") or 0) if num_fewshot is None else num_fewshot
    test = task.splits["test"]
    parts = {test: rows.rows}
    if shots:
        parts["train"] = require_rows(name, "train", data_dir).rows
    data = DatasetDict({split: Dataset.from_list(part) for split, part in parts.items()})
    changes = {
        "custom_dataset": lambda **_: data,
        "validation_split": test if test == "validation" else None,
        "num_fewshot": shots,
        **({} if shots else {"training_split": None, "fewshot_split": None}),
    }
    found = manager.load([{"group": "local", "task": [{"task": name, **changes}]}])["tasks"][name]
    found.set_fewshot_seed(seed=FEWSHOT_SEED)
    return found, parts.get("train", [])


def other_judge(name: str, num_fewshot: int | None) -> Any:
    """Any other task of lm_eval: by its name, or by the path of its YAML file."""
    TaskManager, _ = lm_eval_tasks()
    path = Path(name)
    with blame(f"--tasks {name}"):
        try:
            found = TaskManager(include_defaults=not path.is_file()).load(name)["tasks"]
        except KeyError:
            known = f"{', '.join(TASKS)}, a task of lm_eval or a file"
            raise LoRARiteValueError(f"no such task or file; give {known}") from None
    if len(found) != 1:
        raise LoRARiteValueError(f"--tasks {name} is a group of {len(found)} tasks; name the tasks")
    (judge,) = found.values()
    if num_fewshot is not None or judge.get_config("num_fewshot") is None:
        judge.set_config(key="num_fewshot", value=num_fewshot or 0)
    judge.set_fewshot_seed(seed=FEWSHOT_SEED)
    return judge


def lm_eval_tasks() -> tuple[Any, Path]:
    """lm_eval's TaskManager and the folder of its tasks; an error that names the extra where a package is missing."""
    try:
        import rouge_score  # noqa: F401
        from lm_eval import tasks
    except ImportError:
        raise ImportError('evaluation on tasks needs its extra: pip install "lora-rite[eval]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about its own command line
    return tasks.TaskManager, Path(tasks.__file__).parent
