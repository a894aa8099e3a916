"""Tools that open an export, each in a process where mtp is not importable.

Those that are not installed are skipped; docs/export.md names the versions that were run.
"""

import importlib.util
import json

import pytest
from helpers import run_alone
from test_export import make

pytestmark = pytest.mark.slow


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the client {package} is not installed")


def printed(script: str, tmp_path) -> list:
    cache = tmp_path / "cache"
    cache.mkdir()
    return json.loads(run_alone(script, cache).splitlines()[-1])


LM_EVAL = """
import json
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained={out!r}, trust_remote_code=True, batch_size=4, device="cpu")
got = []
for mode in ("fast", "slow"):
    options = dict(until=["7", "12"], max_gen_toks=12, do_sample=False, mtp_mode=mode)
    requests = [
        Instance(request_type="generate_until", doc={{}}, arguments=(prompt, options), idx=0)
        for prompt in {prompts}
    ]
    got.append(model.generate_until(requests, disable_tqdm=True))
print(json.dumps(got))
"""


@needs("lm_eval")
def test_lm_eval_writes_our_texts_in_both_modes(tmp_path):
    model, text = make(tmp_path / "out")
    prompts = ["1+2=<think>", "34+5=<think>", "6=<think>", "90+12=<think>"]
    got = printed(LM_EVAL.format(out=str(tmp_path / "out"), prompts=prompts), tmp_path)
    tokenizer = text.tokenizer
    for mode, texts in zip(("fast", "slow"), got, strict=True):
        for prompt, said in zip(prompts, texts, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(ids, mtp_mode=mode, max_new_tokens=12)[0, ids.shape[1] :]
            whole = tokenizer.decode(out, skip_special_tokens=True)
            for stop in ("7", "12", "<eos>"):
                whole = whole.split(stop)[0]
            assert said == whole, (mode, prompt)


PEFT = """
import json, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
ids, out = torch.tensor([[2, 5, 6, 7, 8]]), {out!r}
MAIN = r"model\\..*_proj"
HEAD = r"mtp_head\\..*proj"
def texts(model):
    return [
        model.generate(input_ids=ids, mtp_mode=m, max_new_tokens=12).tolist()
        for m in ("slow", "fast")
    ]
def opened():
    return AutoModelForCausalLM.from_pretrained(out + "/export", trust_remote_code=True).eval()
got = {{"none": [texts(opened())]}}
for name, modules in dict(main=MAIN, head=HEAD, both=f"{{MAIN}}|{{HEAD}}").items():
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=modules, init_lora_weights=False)
    model = get_peft_model(opened(), config).eval()
    touched = {{n.split(".")[2] for n, p in model.named_parameters() if "lora" in n}}
    found = [texts(model)]
    model.save_pretrained(f"{{out}}/{{name}}")
    again = PeftModel.from_pretrained(opened(), f"{{out}}/{{name}}").eval()
    found.append(texts(again))
    merged = model.merge_and_unload()
    merged.save_pretrained(f"{{out}}/{{name}}_merged")
    whole = AutoModelForCausalLM.from_pretrained(f"{{out}}/{{name}}_merged", trust_remote_code=True)
    found.append(texts(whole.eval()))
    got[name] = [*found, sorted(touched)]
print(json.dumps(got))
"""


@needs("peft")
def test_adapters_on_main_on_the_head_and_on_both_are_saved_loaded_and_merged(tmp_path):
    make(tmp_path / "export")
    got = printed(PEFT.format(out=str(tmp_path)), tmp_path)
    (slow, fast) = got.pop("none")[0]
    for name, (first, again, merged, touched) in got.items():
        assert first == again == merged, name
        assert touched == {"main": ["model"], "head": ["mtp_head"]}.get(name, ["model", "mtp_head"])
        assert (first[0] == slow) == (name == "head")
        assert first[1] != fast


PIPELINE = """
import json
from transformers import AutoTokenizer, pipeline
given = dict(max_new_tokens=12, do_sample=False, return_full_text=False)
got = []
for trust in (True, False):
    pipe = pipeline("text-generation", model={out!r}, trust_remote_code=trust)
    got.append([type(pipe.model).__name__, pipe("1+2=<think>", **given)[0]["generated_text"]])
print(json.dumps(got))
"""


def test_a_pipeline_decodes_in_the_default_mode_of_the_export(tmp_path):
    from test_export import SUMMARY, tiny_config

    from mtp.hub.export import export

    model, text = make(tmp_path / "out")
    export(model, text, tmp_path / "out", SUMMARY, tiny_config(), default_mode="fast")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Without `mtp_mode`, the mode is `fast`" in card
    got = printed(PIPELINE.format(out=str(tmp_path / "out")), tmp_path)
    ids = text.tokenizer("1+2=<think>", return_tensors="pt").input_ids
    expected = []
    for name, mode in (("LlamaMTPForCausalLM", "fast"), ("LlamaForCausalLM", "slow")):
        out = model.generate(ids, mtp_mode=mode, max_new_tokens=12, do_sample=False)
        said = text.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append([name, said])
    assert got == expected
