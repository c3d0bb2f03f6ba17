"""The README's way to your own text, on a small text: the recipe's name, the folder, and tiny sizes on top."""

from support import TINY, distlm, write_text


def test_own_text_with_the_small_recipe(tmp_path):
    text = write_text(tmp_path / "text", train_lines=300)
    tiny = [word for word in TINY if not word.startswith("name=")]
    words = ["name=mine", f"data.text_dir={text}", "launch.ranks=2", f"run_dir={tmp_path / 'mine'}", *tiny]
    dry = distlm("run", "wikitext2-small", *words, "--dry-run")
    assert "mpirun" in dry.stdout and "distlm train wikitext2-small name=mine" in dry.stdout
    done = distlm("run", "wikitext2-small", *words, "train.updates=3", timeout=400)
    assert "perplexity" in done.stdout and (tmp_path / "mine" / "report.html").exists()
