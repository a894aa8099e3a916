"""Results of an exported folder where the given packages are not installed, as JSON."""

import json
import sys


class Absent:
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder, prompt, *packages):
    sys.meta_path.insert(0, Absent(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    found = {"class": type(model).__name__, "stock class": type(stock).__name__}
    with torch.no_grad():
        found["logits"] = model(ids).logits[0].tolist()
        found["stock logits"] = stock(ids).logits[0].tolist()
    for mode in ("fast", "slow", "verified"):
        out = model.generate(ids, mtp_mode=mode, return_dict_in_generate=True)
        found[mode] = tokenizer.decode(out.sequences[0])
        found[mode + " logprobs"] = out.logprobs.tolist()
    print(json.dumps(found))


main(*sys.argv[1:])
