"""lm-eval on an export: in every mode the accuracy of `mtp evaluate`, in a process without mtp."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import run_alone

from mtp.config import load_run_config
from mtp.evaluation.evaluate import evaluate, held_out
from mtp.hub.build import load_model
from mtp.hub.export import export

sys.path.append(str(Path(__file__).parents[1] / "golden"))
from cases import old_run

NUMBER = 48
TASK = """
task: adder
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], do_sample: false, max_gen_toks: 16}
filter_list:
  - name: answer
    filter:
      - {function: regex, regex_pattern: "</think>(.*)"}
      - {function: take_first}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
SCRIPT = """
import json, torch
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
torch.set_num_threads(1)
model = HFLM("FOLDER/out", trust_remote_code=True, batch_size=16, device="cpu", max_length=64)
tasks = TaskManager(include_path="FOLDER", include_defaults=False)
found = {}
for mode in ("stock", "slow", "fast", "verified"):
    results = lm_eval.simple_evaluate(
        model, tasks=["adder"], task_manager=tasks, gen_kwargs="mtp_mode=" + mode,
        apply_chat_template=True, bootstrap_iters=0,
    )
    found[mode] = results["results"]["adder"]["exact_match,answer"]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_finds_the_accuracy_of_mtp_evaluate(tmp_path):
    run = old_run(tmp_path)
    config = load_run_config(run / "config.yaml")
    model, text = load_model(run / "stages" / "joint")
    export(model.eval(), text, tmp_path / "out", {"stages": [], "seed": 1}, config)
    task = config.task.build()
    given = {"num_problems": NUMBER, "batch_size": 16, "use_head": True, "verified": True}
    metrics, _ = evaluate(model, text, task, config.decoding, **given)
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in held_out(task, NUMBER)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "adder.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    script = SCRIPT.replace("FOLDER", str(tmp_path))
    found = json.loads(run_alone(script, tmp_path).splitlines()[-1])
    slow, fast = metrics["slow_accuracy"], metrics["fast_accuracy"]
    assert found == pytest.approx({"stock": slow, "slow": slow, "verified": slow, "fast": fast})
    assert slow != fast
