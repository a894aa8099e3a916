"""English word problems with an English chain of thought: reasoning-gym's `gsm_symbolic`.

GSM-Symbolic (Mirzadeh et al., arXiv 2410.05229) turns GSM8K problems into templates; an item is a
template with names and numbers filled in. reasoning-gym has 100 templates, of which it uses 85.

A thought is the item's `answer_cot` without its last line, `#### ANSWER`. Item i is generated with
`Random(seed + i)`, so the sets are disjoint ranges of the items of one seed:

| set | templates | items |
|---|---|---|
| `test` | those of `train` | the first |
| `validation` | those of `train` | those after `test` |
| `train` | all but the held-out ones | those after `validation` |
| `unseen_templates` | the held-out ones | the first |

No question is in two sets, and the questions of a held-out set are distinct. Left out of all sets
are items whose thought states something false (`5*0.5=2 tubes`) or whose last line is not the
answer, and the 15 templates that reasoning-gym lists as in need of repair.
"""

import re
from dataclasses import dataclass
from typing import Any

from ..common.bounds import bounded
from .base import Example, Split, Task, TaskConfig, fingerprint
from .equations import commuted, equations

_NUM_ITEMS = 2**20
"""Items of the dataset, each of a random template."""
_MARK = "####"
_NUMBER = re.compile(r"(-?)[$€£]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)")
_NUM_PROBES = 256
_STRIDE = 7919
"""From a training item that may not be used to the next candidate; a prime."""


@dataclass(kw_only=True)
class GsmSymbolicConfig(TaskConfig):
    """`task=gsm_symbolic`, or `task=gsm_symbolic task.templates=[6,10,14,16]`."""

    templates: list[int] = bounded([], at_least=0, at_most=99)
    """Numbers of the templates in use; none: all 85 that reasoning-gym uses."""
    held_out_every: int = bounded(5, at_least=2, at_most=100)
    """A template is held out if its number is `held_out_every - 1` modulo this: 4, 9, 14, ..."""
    num_validation: int = bounded(256, at_least=1, at_most=100_000)
    """Problems that evaluations within a stage use."""
    num_train: int = bounded(100_000, at_least=1)
    """Training items, at most what the chosen templates have."""
    seed: int = bounded(0, at_least=0, at_most=2**63 - 1)
    """Seed of the items."""

    def build(self) -> "GsmSymbolic":
        from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

        unknown = sorted(set(self.templates) - set(tasks_ok))
        if unknown:
            raise ValueError(
                f"task.templates must be templates that reasoning-gym uses, one of {tasks_ok}, got "
                f"{unknown}"
            )
        used = sorted(set(self.templates or tasks_ok))
        held_out = [t for t in used if t % self.held_out_every == self.held_out_every - 1]
        if not 0 < len(held_out) < len(used):
            raise ValueError(
                "task.templates must hold some to train on and some to hold out, but of "
                f"{used} task.held_out_every={self.held_out_every} holds out "
                f"{held_out or 'none'}; add other templates"
            )
        return GsmSymbolic(self, [t for t in used if t not in held_out], held_out)


class GsmSymbolic(Task):
    """See the module. The column `template` of an example is the number of its template."""

    name = "gsm_symbolic"
    test_sets = ("test", "unseen_templates")
    interim_set = "validation"

    def __init__(self, config: GsmSymbolicConfig, seen: list[int], held_out: list[int]):
        from reasoning_gym.factory import create_dataset

        self._dataset: Any = create_dataset("gsm_symbolic", seed=config.seed, size=_NUM_ITEMS)
        rest = self._items_of(seen)
        self._held_out: dict[Split, list[Example]] = {}
        self._held_out_questions: set[str] = set()
        for name, number in (("test", config.num_test), ("validation", config.num_validation)):
            rest = self._hold_out(name, number, rest)
        self._hold_out("unseen_templates", config.num_test, self._items_of(held_out))
        self._train = rest[: config.num_train]

    def size(self, split: Split) -> int:
        return len(self._train) if split == "train" else len(self._held_out[split])

    def example(self, split: Split, index: int) -> Example:
        """Raises ValueError if nearly every question of `train` is held out."""
        if split != "train":
            return self._held_out[split][index]
        for probe in range(_NUM_PROBES):
            example = self._sound_example(self._train[(index + probe * _STRIDE) % len(self._train)])
            if example is not None and fingerprint(example) not in self._held_out_questions:
                return example
        number = len(self._held_out_questions)
        raise ValueError(
            f"task.templates have too few different questions to keep {number} of them for tests; "
            "add templates, or lower task.num_test and task.num_validation"
        )

    def score(self, example: Example, answer: str) -> float:
        """1.0 if the answer is one number, the gold one; a currency sign and commas may be there.

        reasoning-gym's own scorer takes the first number anywhere in a text.
        """
        match = _NUMBER.fullmatch(answer)
        return float(match is not None and _float(match) == float(example.answer))

    def true_steps(self, thought: str) -> tuple[int, int]:
        """(true equations, equations that can be read), see `equations`."""
        found = equations(thought)
        return sum(found), len(found)

    def paraphrase(self, example: Example, thought: str) -> str | None:
        """The thought with the operands of its sums and products exchanged, see `commuted`."""
        other = commuted(thought)
        return None if other == thought else other

    def _items_of(self, templates: list[int]) -> list[int]:
        wanted = set(templates)
        return [i for i, template in enumerate(self._dataset.task_indices) if template in wanted]

    def _hold_out(self, name: Split, number: int, items: list[int]) -> list[int]:
        """Make a held-out set of the first items; the items after them.

        Raises ValueError if there are too few different questions.
        """
        kept: list[Example] = []
        for place, item in enumerate(items):
            if len(kept) == number:
                self._held_out[name] = kept
                return items[place:]
            example = self._sound_example(item)
            if example is not None and fingerprint(example) not in self._held_out_questions:
                self._held_out_questions.add(fingerprint(example))
                kept.append(example)
        key = "num_validation" if name == "validation" else "num_test"
        raise ValueError(
            f"task.{key} must be at most {len(kept)}, the different questions of the set {name}, "
            f"got {number}; lower it or add templates"
        )

    def _sound_example(self, item: int) -> Example | None:
        """An item as an example; None if its thought states something false."""
        entry = self._dataset[item]
        cot = entry["metadata"]["answer_cot"].rstrip()
        thought, _, last = cot.rpartition("\n")
        stated = _NUMBER.fullmatch(last.strip().removeprefix(_MARK).strip())
        if stated is None or _float(stated) != float(entry["answer"]):
            return None
        if not all(equations(thought)):
            return None
        template = self._dataset.task_indices[item]
        return Example(entry["question"], entry["answer"], thought.rstrip(), {"template": template})


def _float(match: re.Match[str]) -> float:
    """Value of a match of `_NUMBER`."""
    return float(match[1] + match[2].replace(",", ""))
