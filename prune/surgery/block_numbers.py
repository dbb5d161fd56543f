"""Numbers of blocks inside settings: as `layers.3` in names and patterns, as keys, in pairs and in nested lists.

Known settings are renumbered, or removed with their blocks.  Anything else that may hold a block's number raises
ArchitectureError naming its place, and the blocks then keep their numbers.

    quantization_config.modules_to_not_convert: ["model.layers.3.mlp.up_proj"]    block 1 dropped: layers.2
    generation_config.json, alignment_heads:    [[2, 0], [3, 1]]                  block 2 dropped: [[2, 1]]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dropformer.prune.block_map import BlockMap, MappedBlock, new_name
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.outline import Outline, StackOutline
from dropformer.prune.surgery.name_patterns import loose_number, number_part
from dropformer.prune.surgery.readings import PARTS, is_pattern, same_modules, the_number, words_of

LEAVES = ("layers", "layer", "blocks", "block", "h")  # usual names of lists of blocks, beside the stack's own
NEUTRAL = {
    "model",
    "language_model",
    "base_model",
    "module",
    "transformer",
    "re",
    "weight",
}  # parts that identify no stack
# Parts of a name that mark blocks of another stack: towers, and multi-token prediction.
OTHERS = re.compile(r"vision|visual|image|audio|speech|vit\b|mtp|nextn|eagle|predict|projector|resampler|qformer", re.I)
PAIRS = {"alignment_heads": ("decoder", "cross")}  # [block, head]: of which stack, and of which of its branches
LEADING = {"assistant_early_exit"}  # how many leading blocks run
STATES = {"dola_layers"}  # numbers of hidden states: 0 is the embeddings', i that after block i - 1
# Nested lists, and dictionaries keyed by numbers, that name no block.
NOT_BLOCKS = re.compile(
    r"token|label|(?<!layer)(?<!block)_ids$|_sizes?$|pinpoints|resolution|section|kernel|stride|shape|bins|scales?$|factor|dims?$|ratio"
    r"|axial|padding|thresholds?|limit|mean|std|pooling|depths|heads$|channels"
)

LAYERS = re.compile(r"(^|_)(layer|block)s?(_|$)")  # fields that may count layers, or name one
_LISTED = re.compile(r"\d+(\s*[,;:-]\s*\d+)*")  # numbers in a text: "3", "1,3,5", "0-3"


# Texts that are no settings.
APART = {"_name_or_path", "transformers_version", "architectures", "auto_map", "base_auto_map", "dropformer_modules"}
APART |= {"base_model_type", "id2label", "label2id", "problem_type", "task_specific_params"}


class _Gone(Exception):
    """The thing named is dropped."""


@dataclass(frozen=True)
class BlockNumbers:
    """Follows the numbers of blocks in settings through one surgery."""

    outline: Outline
    block_map: BlockMap

    @property
    def moved(self) -> bool:
        return not self.block_map.in_place(self.outline)

    def follow(self, settings: Any, place: str = "") -> Any:
        """Settings as JSON holds them, with every name of a module under its new number.

        Entries of lists and keys of dictionaries that name a dropped module are removed.  Raises ArchitectureError
        for a pattern whose numbers cannot be followed.
        """
        if isinstance(settings, str):
            return self._text(settings, place)
        if isinstance(settings, Mapping):
            pairs = [(k, v) for k, v in settings.items() if not isinstance(k, str) or not self._lost(k, place)]
            return {self._text(k, place) if isinstance(k, str) else k: self._inner(k, v, place) for k, v in pairs}
        if isinstance(settings, (list, tuple)):
            return [self.follow(v, place) for v in settings if not isinstance(v, str) or not self._lost(v, place)]
        return settings

    def _inner(self, key: Any, value: Any, place: str) -> Any:
        if key in APART:
            return value
        return self.follow(value, f"{place}.{key}" if place else str(key))

    def _lost(self, text: str, place: str) -> bool:
        try:
            self._renamed(text, place)
        except _Gone:
            return True
        return False

    def _text(self, text: str, place: str) -> str:
        try:
            return self._renamed(text, place)
        except _Gone:
            raise ArchitectureError(f"blocks stay where they are: {place} names a dropped block, `{text}`") from None

    def _renamed(self, text: str, place: str) -> str:
        """A name or pattern under the new numbers.  Raises _Gone where what it names is dropped."""
        if len(text) > 1000 or "\n" in text:  # templates and licences
            return text
        if self.moved and loose_number(text) and not (OTHERS.search(text) or place.endswith("version")):
            raise ArchitectureError(f"blocks stay where they are: {place} has `{text}`, which may name one of them")
        new = self._with_numbers(text, place)
        if self.moved and is_pattern(text) and not same_modules(text, new, self._modules(text, new or text)):
            raise ArchitectureError(f"blocks stay where they are: {place} has `{text}`, which names some of them")
        if new is None:
            raise _Gone
        return new

    def _with_numbers(self, text: str, place: str) -> str | None:
        """A name or pattern with the number in it replaced; None where what it names is dropped."""
        for stack in self.outline.stacks:
            leaf = stack.path.rpartition(".")[2]
            names = "|".join(sorted({leaf, *LEAVES}, key=len, reverse=True))
            for match in reversed(list(re.finditer(rf"(?<![A-Za-z0-9_])({names})(\\*\.)", text))):
                followed = self._with_number(stack, text, match, place)
                if followed is None:
                    return None
                text = followed
        return text

    def _modules(self, old: str, new: str) -> dict[str, str]:
        """Kept modules that a pattern may name: as the dense model calls them -> as the pruned one does."""
        told, words = {the_number(old), the_number(new)}, {*PARTS, *words_of(old)}
        leaves = ["", *(f".{word}" for word in words)]
        found: dict[str, str] = {}
        for stack in self.outline.stacks:
            above = stack.path.rfind(".") + 1  # names are also written from the stack's own on
            for number, block in enumerate(self._blocks(stack)):
                if None not in told and not told & {block.source, block.mlp, number}:
                    continue
                for kind in {branch.kind for branch in stack.branches} - {*block.skipped}:
                    source = block.mlp if kind == "mlp" else block.source
                    for part in (module + leaf for module in stack.modules(kind, source) for leaf in leaves):
                        before, after = f"{stack.path}.{source}.{part}", f"{stack.path}.{number}.{part}"
                        found |= {before: after, before[above:]: after[above:]}
        return found

    def _speaks_of(self, stack: StackOutline, before: str, leaf: str, place: str, text: str) -> bool:
        """Does the name refer to a block of this stack?  Raises ArchitectureError where that is not clear."""
        *path, own = stack.path.split(".")
        words = set(re.findall(r"[A-Za-z]\w*", before.replace("\\", " "))) - NEUTRAL
        foreign = words - set(path)
        if not foreign:
            sibling = any(words <= set(s.path.split(".")) for s in self.outline.stacks if s is not stack)
            if sibling and not words and self.moved:
                raise ArchitectureError(f"blocks stay where they are: {place} does not say of which stack `{text}` is")
            return leaf == own or not sibling
        known = any(foreign & set(s.path.split(".")) for s in self.outline.stacks if s is not stack)
        if known or OTHERS.search(before) or not self.moved:
            return False
        raise ArchitectureError(f"blocks stay where they are: {place} has `{text}`, which may name one of them")

    def _with_number(self, stack: StackOutline, text: str, match: re.Match[str], place: str) -> str | None:
        try:
            part = number_part(text, match.end(), len(match[2]) > 1)
            if part is None or not any(part.names(i) for i in range(stack.blocks)):
                return text
            if not self._speaks_of(stack, text[: match.start()], match[1], place, text):
                return text
            new = {i: self._new_number(stack, i, part.rest) for i in range(stack.blocks)}
            return part.follow(new, len(self._blocks(stack)))
        except ValueError as error:
            if not self.moved:
                return text
            raise ArchitectureError(f"blocks stay where they are: {place}: {error}") from None

    def _new_number(self, stack: StackOutline, old: int, module: str) -> int | None:
        """The new number of a block, or of a module's half of it; None where it is dropped.  Raises ValueError where
        its halves get different numbers and no module is named."""
        named = new_name(self.outline, self.block_map, f"{stack.path}.{old}.{module}")
        if named is None:
            return None
        if not module and any(b.source != b.mlp and old in (b.source, b.mlp) for b in self._blocks(stack)):
            raise ValueError(f"block {old} is named, and its halves part")
        return int(named.removeprefix(stack.path + ".").partition(".")[0])

    def generation(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """generation_config.json, or what a config has of it, after the surgery.  Raises ArchitectureError."""
        new = {key: self._generation(key, value) for key, value in self.follow(fields).items()}
        return {key: value for key, value in new.items() if value != [] or fields[key] == []}

    def _generation(self, key: str, value: Any) -> Any:
        if key in PAIRS and isinstance(value, list):
            return self.pairs(key, value)
        if key in LEADING and _are_numbers([value]):
            return sum(b.source < value for b in self._writer_blocks())
        if key in STATES and isinstance(value, list) and _are_numbers(value):
            kept = [sum(b.source < i for b in self._writer_blocks()) for i in value]
            return sorted(set(kept))
        if self.moved and key in {*LEADING, *STATES} and not (value is None or isinstance(value, str)):
            raise ArchitectureError(f"blocks stay where they are: {key} has {value!r:.60}, which cannot be followed")
        if self.moved:
            self.check_settings(value, "", key)
        return value

    def _blocks(self, stack: StackOutline) -> tuple[MappedBlock, ...]:
        return self.block_map.stacks[stack.name]

    def _stays(self, numbers: Iterable[int]) -> bool:
        """Does each of these blocks, of any stack, keep its number?"""
        stacks = self.block_map.stacks.values()
        return all(i < len(blocks) and blocks[i].source == blocks[i].mlp == i for i in numbers for blocks in stacks)

    def _writer_blocks(self) -> tuple[MappedBlock, ...]:
        stack = next((s for s in self.outline.stacks if s.name in ("", "decoder")), self.outline.stacks[0])
        return tuple(b for b in self.block_map.stacks[stack.name] if not b.empty)

    def pairs(self, key: str, value: list) -> list:
        """Pairs of a block and something of it (a head), with the block's new number; those of dropped ones left
        out."""
        name, kind = PAIRS[key]
        stack = next((s for s in self.outline.stacks if s.name in ("", name)), None)
        if stack is None:
            return value
        if not all(isinstance(pair, (list, tuple)) and pair and _are_numbers(pair[:1]) for pair in value):
            if not self.moved:
                return value
            raise ArchitectureError(f"blocks stay where they are: {key} is no list of pairs of a block and a head")
        blocks = self.block_map.stacks[stack.name]
        kept = {b.source: new for new, b in enumerate(blocks) if kind not in b.skipped and not b.empty}
        return [[kept[block], *rest] for block, *rest in value if block in kept]

    def check_unknown(self, key: str, value: Any, place: str = "") -> None:
        """Raise ArchitectureError for a nested list or a numbered dictionary that may name blocks."""
        place = f"{place}.{key}" if place else key
        if isinstance(value, Mapping):
            if _numbered(value, self._count) and not _exempt(key) and not self._stays(map(int, value)):
                raise ArchitectureError(f"blocks stay where they are: {place} is keyed by what may be their numbers")
            for inner, item in value.items():
                self.check_unknown(str(inner), item, place)
        elif isinstance(value, (list, tuple)) and not _exempt(key):
            nested = [v for v in value if isinstance(v, (list, tuple)) and v]
            firsts = [v[0] for v in nested]
            numbered = len(nested) == len(value) > 0 and all(type(v) is int and 0 <= v < self._count for v in firsts)
            if numbered and not self._stays(firsts):
                raise ArchitectureError(f"blocks stay where they are: {place} may name some of them")

    def check_settings(self, value: Any, place: str, key: str = "") -> None:
        """`check_unknown` for settings that no code here reads: plain lists and single numbers are looked at too.

        Raises ArchitectureError for a list of what may be block numbers, and for a number that a field named after
        layers holds.
        """
        named = ".".join(filter(None, (place, key)))
        if isinstance(value, Mapping):
            self.check_unknown(key, value, place)
            for inner, item in value.items():
                self.check_settings(item, named, str(inner))
        elif isinstance(value, (list, tuple)):
            self.check_unknown(key, value, place)
            if not _exempt(key) and (
                names_blocks(key, list(value), self._count, self._stays)
                or (len(value) == self._count > 2 and LAYERS.search(key))
            ):
                raise ArchitectureError(f"blocks stay where they are: {named} may name some of them")
            for item in value:
                if isinstance(item, Mapping):
                    self.check_settings(item, named)
        elif type(value) is int and LAYERS.search(key) and not NOT_BLOCKS.search(key) and 0 <= value <= self._count:
            raise ArchitectureError(f"blocks stay where they are: {named} ({value}) may count or name them")
        elif isinstance(value, str) and LAYERS.search(key) and _LISTED.fullmatch(value.strip()):
            raise ArchitectureError(f"blocks stay where they are: {named} (`{value}`) may name some of them")

    @property
    def _count(self) -> int:
        return max(stack.blocks for stack in self.outline.stacks)


def _exempt(key: str) -> bool:
    """Does a name say that what it holds are no blocks?"""
    return NOT_BLOCKS.search(key) is not None and LAYERS.search(key) is None


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _numbered(value: Mapping[Any, Any], count: int) -> bool:
    return bool(value) and all(re.fullmatch(r"\d{1,9}", str(k)) and int(k) < count for k in value)


def names_blocks(key: str, value: list, count: int, stays: Callable[[Iterable[int]], bool]) -> bool:
    """May an unknown list be one of block indices, of which some change?  Rising whole numbers below the count, ids of
    tokens apart."""
    numbers = all(type(v) is int and 0 <= v < count for v in value)
    if not value or not numbers or sorted(set(value)) != value or "token" in key:
        return False
    return not stays(value)
