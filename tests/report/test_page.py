"""The page's structure: tables behind every chart, names escaped, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from safetensors.torch import load_file, save_file

from multigraft import LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from multigraft.report import charts, collect, page
from tests.inspection.adapters import net, write
from tests.report.conftest import write_full

VOID = {"meta", "link", "line", "rect", "circle", "path", "polyline"}
EVIL = "<img src=x onerror=alert(1)>\"'&amp;\u202egnp"


class Page(HTMLParser):
    """Elements with their attributes, and the text of each element by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts.setdefault(tag, []).append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    return write_full(tmp_path_factory.mktemp("full")).read_text(encoding="utf-8")


def test_every_element_is_closed_and_every_id_is_one(full):
    ids = [a["id"] for _, a in Page(full).elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_link_and_cell_leads_to_something_in_the_page(full):
    found = Page(full)
    ids = {a["id"] for _, a in found.elements if "id" in a}
    targets = {a["href"].removeprefix("#") for a in found.all("a")}
    targets |= {a["data-row"] for a in found.all("td") if "data-row" in a}
    targets |= {a["aria-labelledby"] for a in found.all("section")}
    assert targets <= ids
    assert len(targets) > 10


def test_every_table_has_a_caption_and_headings(full):
    tables = re.findall(r"<table.*?</table>", full, re.DOTALL)
    assert len(tables) == 11
    for table in tables:
        assert table.count("<caption>") == 1
        head = table[table.index("<thead>") : table.index("</thead>")]
        assert all('scope="col"' in each for each in re.findall(r"<th\b[^>]*>", head))
        rows = re.findall(r"<tr.*?</tr>", table[table.index("<tbody>") :], re.DOTALL)
        assert rows
        assert all('<th scope="row">' in row for row in rows)


def test_every_picture_says_what_it_shows_or_is_hidden_from_readers(full):
    for attributes in Page(full).all("svg"):
        named = attributes.get("role") == "img" and attributes.get("aria-label")
        assert named or attributes.get("aria-hidden") == "true"


def test_every_shade_has_its_number_beside_it(full):
    cells = re.findall(r'<td class="l\d"[^>]*>(.*?)</td>', full)
    assert len(cells) == 2 * (6 + 3)
    assert all(re.search(r"\d", cell) for cell in cells)


def test_lines_differ_in_more_than_colour(full):
    style = re.search(r"<style>(.*?)</style>", full, re.DOTALL)[1]
    dashes = re.findall(r"\.s(\d) polyline \{ stroke-dasharray: ([\d ]+);", style)
    assert [number for number, _ in dashes] == list("12345")
    assert len({dash for _, dash in dashes}) == 5


def test_colours_are_set_for_light_and_dark(full):
    style = re.search(r"<style>(.*?)</style>", full, re.DOTALL)[1]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--\w+): #", light))
    assert names == set(re.findall(r"(--\w+): #", dark[: dark.index("* {")]))
    assert len(names) > 20


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    low, high = sorted(map(_luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(full, scheme):
    style = re.search(r"<style>(.*?)</style>", full, re.DOTALL)[1]
    part = style.split("@media (prefers-color-scheme: dark)")[scheme]
    colours = dict(re.findall(r"(--\w+): (#\w{6})", part.split("* {")[0]))
    pairs = [
        (ink, back) for ink in ("--ink", "--soft", "--accent") for back in ("--page", "--card")
    ]
    pairs += [("--low", f"--l{n}") for n in range(1, 6)]
    pairs += [("--high", f"--l{n}") for n in range(6, 9)]
    weak = [p for p in pairs if _contrast(colours[p[0]], colours[p[1]]) < 4.5]
    assert weak == []


def test_nothing_is_fetched_and_only_its_own_script_may_run(full):
    found = Page(full)
    assert found.all("img") == found.all("iframe") == found.all("base") == []
    assert [a for a in found.all("script") if "src" in a] == []
    assert [a["href"] for a in found.all("link")] == ["data:,"]
    style = re.search(r"<style>(.*?)</style>", full, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(
        a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", full, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any(
        name.startswith("on") or name == "style" for _, a in found.elements for name in a
    )


def test_names_are_text_wherever_they_stand(tmp_path):
    folder = write(tmp_path / EVIL.replace("/", ""))
    path = folder / "adapter_model.safetensors"
    named = EVIL.replace("\u202e", "")  # which the reader of files refuses in a tensor's name
    held = {
        key.replace("layers.0.up", f"layers.0.{named}"): tensor
        for key, tensor in load_file(path).items()
    }
    save_file(held, path, {"format": "pt"})
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text()) | {"peft_type": EVIL, "base_model_name_or_path": EVIL}
    other = write(tmp_path / "other")
    (other / "adapter_config.json").write_text(json.dumps(values))
    (folder / "train_log.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1, "adapter": EVIL}) + "\n" for n in (1, 2))
    )
    text = page(collect([folder, other]))
    found = Page(text)
    assert found.all("img") == []
    assert "<img" not in text
    assert "\u202e" not in text
    assert any("<img src=x onerror=alert(1)>" in part for part in found.texts["bdi"])
    assert not any(name.startswith("on") for _, a in found.elements for name in a)


def test_without_a_base_it_says_that_norms_are_absolute(pair):
    found = Page(page(collect(pair)))
    text = " ".join(found.texts["main"] + found.texts["header"])
    assert "norms are absolute" in text
    assert "Intruder dimensions" not in text
    assert "‖ΔW‖ / ‖W‖" not in text


def test_figures_stand_in_the_page(pair):
    report = collect(pair[:1], base=net())
    (each,) = report.adapters
    text = page(report)
    assert f">{100 * each.relative:.2g} %<" in text
    for site in each.sites.values():
        assert f">{site.norm:#.3g}<" in text


ODD = {
    "new": LoraConfig(target_modules=["up"]),
    "one number a site": LoraConfig(r=1, target_modules=["0.up"]),
    "tokens": PromptTuningConfig(num_virtual_tokens=3, token_dim=8),
    "norms": LNTuningConfig(target_modules=["head"]),
    "an embedding": LoraConfig(target_modules=["words"]),
    "dora": LoraConfig(target_modules=["up"], use_dora=True),
    "biases": LoraConfig(target_modules=["up"], bias="all", lora_bias=True),
}


@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "on its base"])
@pytest.mark.parametrize("config", ODD.values(), ids=ODD.keys())
def test_odd_adapters_still_make_a_page(tmp_path, config, with_base):
    model = get_peft_model(net(), config)
    model.save_pretrained(tmp_path / "a")
    found = Page(page(collect([tmp_path / "a"], base=net() if with_base else None)))
    assert "a" in found.texts["bdi"]


def test_values_that_are_not_finite_are_said_to_be(pair):
    path = pair[0] / "adapter_model.safetensors"
    held = load_file(path)
    held["base_model.model.layers.0.up.lora_A.weight"][0, 0] = float("nan")
    save_file(held, path, {"format": "pt"})
    found = Page(page(collect(pair)))
    assert "not finite" in found.texts["td"]
    assert not any("nan" in text.lower() for text in found.texts["main"])


@pytest.mark.parametrize(
    ("named", "shown"),
    [("/srv/models/small", "small"), ("./small", "small"), ("owner/small", "owner/small")],
)
def test_nobodys_folders_stand_in_the_page(pair, named, shown):
    config = pair[0] / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": named}
    config.write_text(json.dumps(values))
    base = net()
    base.name_or_path = named
    found = Page(page(collect(pair[:1], base=base)))
    assert found.texts["bdi"].count(shown) == 2
    assert "srv" not in " ".join(found.texts["html"])


def test_reasons_without_end_are_cut_short(pair):
    report = collect(pair[:1])
    left = {f"site {n}": f"reason {n}" for n in range(50)}
    many = replace(report, adapters=(replace(report.adapters[0], left=left),))
    items = [text for text in Page(page(many)).texts["li"] if "reason" in text]
    assert len(items) == 20 + 1
    assert items[-1] == "and for 30 more reasons"


def test_lines_of_many_adapters_all_look_different():
    looks = set()
    for style in range(18):
        drawn = charts.key([charts.Line("a", (), style)])
        looks.add((re.search(r'class="line (s\d)"', drawn)[1], re.search(r"/><(\w+)", drawn)[1]))
    assert len(looks) == 18


def test_one_adapter_has_no_switch_and_no_similarity(pair):
    text = page(collect(pair[:1]))
    assert "<select" not in text
    assert 'id="similarity"' not in text


def test_what_has_no_figures_is_named(tmp_path):
    text = page(collect([write(tmp_path / "a", modules_to_save=["head"])]))
    assert "<li>head.weight: no part of a low-rank pair</li>" in text
