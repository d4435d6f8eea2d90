"""What is generated comes from figures/ alone, and the committed parts are not stale."""

import json

import pytest

from helpers import claims, figures, profiles
from helpers.estimates import Estimate
from helpers.places import PROJECT
from tools import readme

ATLAS = profiles.load("atlas")
MARKERS = ("answers", "scorecard", "ladder")
TEXT = "# Title\n" + "\n".join(f"<!-- {name} -->\nold {name}\n<!-- /{name} -->" for name in MARKERS) + "\nThe end.\n"
GALLERIES = sorted((PROJECT / "figures").glob("*/claims.json"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project's figures: three of the atlas, and claims."""
    monkeypatch.setenv("DSTEER_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(figures, "notebook_of", lambda figure: "05_spectral_signatures")
    controls, further = {"SFT at equal strength": 0.01, "centred": 0.25}, {"SFT": Estimate(-0.4, -0.5, -0.3)}
    claims.record(
        ATLAS, "C9", Estimate(-0.5, -0.7, -0.25, (-0.6, -0.4)), 240, "fig4a_entropy", controls, beyond=further
    )
    claims.record(ATLAS, "C1", Estimate(2e-16, 2e-16, 2e-16), 6, "fig1b_field")
    claims.record(ATLAS, "C12", Estimate(-0.9, -1.0, -0.8), 240, "fig02_training")
    claims.record(ATLAS, "E1", Estimate(0.9, 0.85, 1.0), 240, "fig07_families")
    for figure in ("fig4a_entropy", "fig02_training", "fig1b_field"):
        about = {"caption": f"See {figure}.", "notebook": "05_spectral_signatures", "claims": [], "numbers": {}}
        (tmp_path / "figures" / "atlas" / f"{figure}.json").write_text(json.dumps(about))
    said = {role: [f"{role} says {i} | too" for i in range(3)] for role in ("dpo", "base", "steered", "desteered")}
    about = {"caption": "One held-out prompt (Who (if any)?) at three doses.", "notebook": "09_explorer", "claims": []}
    about["numbers"] = {"answers": said, "doses": [0.0, 1.0, 2.0]}
    (tmp_path / "figures" / "atlas" / "fig09_prompt.json").write_text(json.dumps(about))
    rungs = {rung: {"KL": [i / 8, -0.5, 1.0, []]} for i, rung in enumerate(readme.RUNGS)}
    about = {
        "caption": "Rungs.",
        "notebook": "11_ladder",
        "claims": [],
        "numbers": {"tone": rungs | {"strength": 0.156}},
    }
    (tmp_path / "figures" / "atlas" / "fig11_ladder.json").write_text(json.dumps(about))
    return tmp_path


def block(text, name):
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def cells(row):
    return [cell.strip() for cell in row.strip("|").replace("\\|", "¦").split("|")]


def test_every_block_is_written_anew_and_nothing_else_changes(root):
    text = readme.rendered(TEXT, root)
    assert text.startswith("# Title\n") and text.endswith("\nThe end.\n") and "old" not in text
    names = [cells(row)[0].split()[0] for row in block(text, "scorecard").splitlines() if row.startswith("| ")]
    assert names == ["It", "**C1**", "**C9**", "**C12**"]
    assert block(text, "answers") == readme.answers(root / "figures" / "atlas")
    assert cells(block(text, "ladder").splitlines()[-1])[:2] == ["tone (0.16 nats)", "0.00 [-0.50, 1.00]"]
    assert readme.rendered(text, root) == text


def test_the_ladder_has_the_families_of_a_real_model_after_the_organism_s(root):
    atlas, real = (root / "figures" / name for name in ("atlas", "smollm2"))
    real.mkdir()
    rungs = (atlas / "fig11_ladder.json").read_text().replace('"tone"', '"sober"').replace("0.125", "0.5")
    (real / "fig11_ladder.json").write_text(rungs)
    of_atlas, of_real = map(cells, readme.ladder(atlas, real).splitlines()[2:])
    assert of_atlas[:3] == ["tone (0.16 nats)", "0.00 [-0.50, 1.00]", "0.12 [-0.50, 1.00]"]
    assert of_real[:3] == ["sober, SmolLM2 (0.16 nats)", "0.00 [-0.50, 1.00]", "0.50 [-0.50, 1.00]"]


@pytest.mark.parametrize("name", MARKERS)
def test_a_missing_or_doubled_marker_is_named(root, name):
    for text in (TEXT.replace(f"<!-- {name} -->", ""), TEXT.replace(f"<!-- /{name} -->", ""), TEXT + TEXT):
        with pytest.raises(ValueError, match=r"README\.md must hold the markers of the block '.*' exactly once"):
            readme.rendered(text, root)
    with pytest.raises(ValueError, match=f"'{name}' exactly once, found 0"):
        readme.rendered(TEXT.replace(f"<!-- {name} -->", ""), root)


def test_one_prompt_is_answered_by_the_four_models_at_dose_1(root):
    head, _, *rows = readme.answers(root / "figures" / "atlas").splitlines()
    assert cells(head) == ["Model", "Who (if any)?"]
    said = [cells(row) for row in rows]
    assert [text for _, text in said] == [f"{role} says 1 ¦ too" for role in ("base", "steered", "desteered", "dpo")]
    assert [name for name, _ in said] == ["base", r"base + v\*", r"DPO − v\*", "DPO"]


def test_a_row_of_the_scorecard_says_what_was_measured_the_verdict_in_its_parts_and_its_caveat(root):
    head, rule, c1, c9, c12 = readme.scorecard(claims.load(ATLAS), claims.CLAIMS, {}).splitlines()
    assert {len(cells(row)) for row in (head, rule, c1, c9, c12)} == {5}
    assert cells(c9) == [
        f"**C9** {claims.ALL['C9'].plain}",
        "nats -0.50 [-0.70, -0.25]; claimed below 0; over prompts and 2 training seeds",
        "**reproduced** (direction yes; size inside; specific yes beside SFT)",
        "about the mean it is 0.25",
        "",
    ]  # fmt: skip
    assert cells(c1)[2:] == ["**algebra** (size inside)", "of single tokens", ""]
    assert cells(c12)[2:] == ["**not reproduced** (size outside)", "", ""]  # what its caveat tells was not measured


def test_a_real_model_stands_beside_it_in_bold_where_its_verdict_is_another(root):
    real = ATLAS.replace(name="smollm2")
    for name, value in (("C1", 1e-13), ("C9", 0.3), ("C12", 0.9)):
        claims.record(real, name, Estimate(value, 0.9 * value, 1.1 * value), 200, "fig")
    rows = readme.scorecard(claims.load(ATLAS), claims.CLAIMS, claims.load(real)).splitlines()[2:]
    c1, c9, c12 = (cells(row)[-1] for row in rows)
    assert c1 == "algebra" and c12 == "0.90 [0.81, 0.99]: not reproduced"
    assert c9 == "0.30 [0.27, 0.33]: **not reproduced**"


def test_claims_that_were_asked_of_several_worlds_are_shown_by_these(root):
    worlds = ATLAS.replace(name="worlds")
    claims.record(worlds, "C9", Estimate(-0.1, -0.2, -0.05), 960, "fig10_worlds", varied="8 worlds")
    shown = block(readme.rendered(TEXT, root), "scorecard")
    assert "nats -0.10 [-0.20, -0.050]; claimed below 0; over 8 worlds" in shown and "**C1**" in shown


def test_a_profile_s_page_has_every_claim_with_its_controls(root):
    text = readme.gallery(root / "figures" / "atlas")
    c1, c9, c12, e1 = (cells(row) for row in text.splitlines() if row.startswith(("| C", "| E")) and "§" in row)
    assert {len(row) for row in (c1, c9, c12, e1)} == {7} and e1[0] == "E1 (§ 2.3)"
    assert c9[:4] == [
        "C9 (§ 4, Fig. 4a)", claims.ALL["C9"].statement, "[05](../../notebooks/05_spectral_signatures.ipynb)",
        "[fig4a_entropy](fig4a_entropy.png)",
    ]  # fmt: skip
    measured = "**-0.50 [-0.70, -0.25]**, each -0.60, -0.40, n = 240"
    assert c9[4] == f"{claims.ALL['C9'].metric}: {measured}<br><sub>SFT at equal strength: 0.010; centred: 0.25</sub>"
    assert c9[5] == "below 0" and c9[6].startswith("**reproduced** (")
    assert c12[5:] == ["-0.50 to 0.50", "**not reproduced** (size outside)"]


def test_a_profile_s_page_leads_to_its_own_executed_notebooks_where_they_are_kept(root):
    folder = root / "figures" / "atlas"
    (folder / readme.PAGES).mkdir()
    (folder / readme.PAGES / "05_spectral_signatures.ipynb").touch()
    text = readme.gallery(folder)
    assert "[05](pages/05_spectral_signatures.ipynb)" in text and "[05](../../" not in text
    assert "](../../notebooks/" in text


def test_a_bar_in_a_statement_does_not_end_its_cell(root):
    claims.record(ATLAS, "C4", Estimate(0.3, 0.2, 0.4), 240, "fig1c_cloud")
    (row,) = [row for row in readme.claims_table(claims.load(ATLAS), root).splitlines() if row.startswith("| C4")]
    assert "|" in claims.ALL["C4"].metric and len(cells(row)) == 7


def test_a_profile_s_page_shows_the_papers_figures_first_each_with_its_caption(root):
    text = readme.gallery(root / "figures" / "atlas")
    places = [text.index(f"![{name}]({name}.png)") for name in ("fig1b_field", "fig4a_entropy", "fig02_training")]
    assert places == sorted(places) and text.count("![") == 5
    assert "### Figure 1b\n" in text and "### fig02_training\n" in text
    assert "See fig4a_entropy. (Notebook [05](../../notebooks/05_spectral_signatures.ipynb).)" in text


def test_the_committed_readme_is_what_the_committed_figures_say():
    text = (PROJECT / "README.md").read_text()
    assert readme.rendered(text, PROJECT) == text


@pytest.mark.parametrize("ledger", GALLERIES, ids=lambda path: path.parent.name)
def test_a_committed_gallery_is_what_the_figures_beside_it_say(ledger):
    assert (ledger.parent / "README.md").read_text() == readme.gallery(ledger.parent)


@pytest.mark.parametrize(
    "path",
    [PROJECT / "README.md", *(path.parent / "README.md" for path in GALLERIES)],
    ids=lambda path: path.parent.name,
)
def test_every_picture_and_notebook_that_a_page_links_to_exists(path):
    linked = {part.split(")")[0].split("#")[0] for part in path.read_text().split("](")[1:]}
    local = {link for link in linked if link and "://" not in link}
    assert any(link.endswith(".png") for link in local)
    assert [link for link in sorted(local) if not (path.parent / link).exists()] == []


def test_the_readme_is_short():
    assert len((PROJECT / "README.md").read_bytes()) <= 12 * 1024
