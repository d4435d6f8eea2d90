"""The README's generated parts come from figures/ alone, and the committed ones are not stale."""

import json
from dataclasses import replace

import pytest

from helpers import artifacts, claims, readme
from helpers.metrics import Estimate
from helpers.profiles import BUILT_IN

MARKERS = ("claims", "ours", "figures", "tinystories", "tinystories-claims")
TEXT = "# Title\n" + "\n".join(f"<!-- {name} -->\nold {name}\n<!-- /{name} -->" for name in MARKERS) + "\nThe end.\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project's figures: three of the atlas, one of tinystories, and claims of both."""
    monkeypatch.setenv("DSTEER_FIGURES", str(tmp_path / "figures"))
    for name in ("atlas", "tinystories"):
        profile = replace(BUILT_IN["atlas"], name=name)
        claims.record(
            profile,
            "C9",
            Estimate(-0.5, -0.7, -0.25, (-0.6, -0.4)),
            240,
            "05_spectral_signatures",
            "fig4a_entropy",
            {"random": 0.01},
        )
    claims.record(BUILT_IN["atlas"], "C1", Estimate(2e-16, 1e-16, 3e-15), 6, "01_derivation_check", "fig1b_field")
    claims.record(BUILT_IN["atlas"], "C12", Estimate(-0.3, -0.4, -0.2), 240, "02_dpo_lora", "fig02_training")
    for profile, figure in (
        ("atlas", "fig4a_entropy"),
        ("atlas", "fig02_training"),
        ("atlas", "fig1b_field"),
        ("tinystories", "fig3_x"),
    ):
        about = {"caption": f"See {figure}.", "notebook": "05_spectral_signatures", "claims": [], "numbers": {}}
        (tmp_path / "figures" / profile / f"{figure}.json").write_text(json.dumps(about))
    return tmp_path


def block(text, name):
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_every_block_is_written_anew_and_nothing_else_changes(root):
    text = readme.rendered(TEXT, root)
    assert text.startswith("# Title\n") and text.endswith("\nThe end.\n") and "old" not in text
    assert block(text, "claims") == readme.claims_table(root, "atlas")
    assert block(text, "ours") == readme.claims_table(root, "atlas", claims.OURS, "We predicted that")
    assert block(text, "tinystories-claims") == readme.claims_table(root, "tinystories")
    assert block(text, "figures") == readme.gallery(root, "atlas")
    assert block(text, "tinystories") == readme.gallery(root, "tinystories")
    assert readme.rendered(text, root) == text


@pytest.mark.parametrize("name", MARKERS)
def test_a_missing_or_doubled_marker_is_named(root, name):
    for text in (TEXT.replace(f"<!-- {name} -->", ""), TEXT.replace(f"<!-- /{name} -->", ""), TEXT + TEXT):
        with pytest.raises(ValueError, match=r"README\.md must hold the markers of the block '.*' exactly once"):
            readme.rendered(text, root)
    with pytest.raises(ValueError, match=f"'{name}' exactly once, found 0"):
        readme.rendered(TEXT.replace(f"<!-- {name} -->", ""), root)


def cells(row):
    return [cell.strip() for cell in row.strip("|").replace("\\|", "¦").split("|")]


def test_the_claims_are_a_row_each_in_the_papers_order(root):
    head, rule, *rows = readme.claims_table(root, "atlas").splitlines()
    assert [cells(row)[0] for row in rows] == ["**C1** (§ 2, 2.2)", "**C9** (§ 4, Fig. 4a)", "**C12** (§ title, 5)"]
    assert {len(cells(row)) for row in (head, rule, *rows)} == {7}


def test_a_row_holds_the_statement_the_number_its_interval_and_the_verdict(root):
    c1, c9, c12 = map(cells, readme.claims_table(root, "atlas").splitlines()[2:])
    assert c9[1:4] == [
        claims.CLAIMS["C9"].statement,
        "[05](notebooks/05_spectral_signatures.ipynb)",
        "[fig4a_entropy](figures/atlas/fig4a_entropy.png)",
    ]
    measured = "**-0.50** [-0.70, -0.25], seeds -0.60, -0.40, n = 240<br><sub>random: 0.010</sub>"
    assert c9[4] == f"{claims.CLAIMS['C9'].metric}: {measured}"
    assert (c9[5].split(" to ")[0], c9[6]) == ("−∞", "reproduced")
    assert c1[4].endswith("**2.0e-16** [1.0e-16, 3.0e-15], n = 6") and c1[5:] == ["0.00 to 1.0e-10", "reproduced"]
    assert c12[5:] == ["-0.050 to 0.050", "not reproduced"]


def test_our_own_predictions_have_a_table_of_their_own(root):
    claims.record(BUILT_IN["atlas"], "E1", Estimate(0.9, 0.85, 1.0), 240, "07_when_is_dpo_steering", "fig07_families")
    head, _, row = readme.claims_table(root, "atlas", claims.OURS, "We predicted that").splitlines()
    assert (
        cells(head)[1] == "We predicted that" and cells(row)[0].startswith("**E1**") and cells(row)[-1] == "reproduced"
    )
    assert "E1" not in readme.claims_table(root, "atlas")


def test_a_bar_in_a_statement_does_not_end_its_cell(root):
    claims.record(BUILT_IN["atlas"], "C4", Estimate(0.3, 0.2, 0.4), 240, "03_steering_vector", "fig1c_cloud")
    rows = [row for row in readme.claims_table(root, "atlas").splitlines() if row.startswith("| **C4**")]
    assert "|" in claims.CLAIMS["C4"].metric and len(cells(rows[0])) == 7


def test_the_gallery_shows_the_papers_figures_first_each_with_its_caption(root):
    text = readme.gallery(root, "atlas")
    places = [
        text.index(f"![{name}](figures/atlas/{name}.png)")
        for name in ("fig1b_field", "fig4a_entropy", "fig02_training")
    ]
    assert places == sorted(places) and text.count("![") == 3
    assert "**Figure 1b** · notebook [05](notebooks/05_spectral_signatures.ipynb)" in text
    assert "**fig02_training** ·" in text and "See fig4a_entropy." in text and "claims" not in text


def test_the_committed_readme_is_what_the_committed_figures_say():
    text = (artifacts.PROJECT / "README.md").read_text()
    assert readme.rendered(text, artifacts.PROJECT) == text


def test_every_picture_and_notebook_that_the_readme_links_to_exists():
    text = (artifacts.PROJECT / "README.md").read_text()
    linked = {part.split(")")[0].split("#")[0] for part in text.split("](")[1:]}
    local = {link for link in linked if link and "://" not in link}
    assert any(link.endswith(".png") for link in local)
    assert [link for link in sorted(local) if not (artifacts.PROJECT / link).exists()] == []
