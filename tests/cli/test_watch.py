import json


def test_watching_shows_what_happened_beside_the_training_and_writes_its_files(bolza, home):
    common = ("watch", "--model", "user_code:net", "--data", "user_code:good", "--batch", "8", "--lr", "1000")
    result = bolza(*common, "--steps", "60", "--every", "5", "--json", "w.json")
    assert result.exit_code == 0, result.stderr
    assert "What it cost" in result.stdout and "Curves" in result.stdout
    record = json.loads((home / "w.json").read_text())
    assert record["schema"] == "bolza.watch/1" and record["run"]["step"] == 60
    assert record["watch"]["steps"] == 60 and record["watch"]["readings"]["sharpness"]


def test_a_run_that_is_watched_resumes_and_ends_as_one_that_is_not(bolza, home):
    common = ("--model", "user_code:net", "--data", "user_code:good", "--batch", "8", "--lr", "0.1")
    assert bolza("train", *common, "--steps", "10", "--json", "plain.json").exit_code == 0
    assert bolza("watch", *common, "--steps", "5", "--checkpoint", "c").exit_code == 0
    again = bolza("watch", *common, "--steps", "10", "--checkpoint", "c", "--resume", "--json", "w.json")
    assert again.exit_code == 0, again.stderr
    plain, watched = (json.loads((home / name).read_text()) for name in ("plain.json", "w.json"))
    assert plain["run"]["train_loss"][-1] == watched["run"]["train_loss"][-1]
    assert watched["watch"]["steps"] == 10


def test_the_help_of_watch_has_the_options_of_train_and_its_own(bolza):
    text = bolza("watch", "--help").stdout
    assert all(
        option in text for option in ("--budget", "--every", "--lr", "--optimizer", "--resume", "--html")
    )
    assert "bolza watch" in text and "--debug" in text


def test_a_budget_that_makes_no_sense_ends_as_one_sentence(bolza):
    result = bolza("watch", "--model", "user_code:net", "--data", "user_code:good", "--budget", "-1")
    assert result.exit_code != 0 and "budget=-1" in result.stderr and "Traceback" not in result.stderr


def test_a_run_may_be_watched_and_controlled_at_once(bolza, home):
    common = ("--model", "user_code:net", "--data", "user_code:good", "--batch", "8", "--lr", "0.5")
    both = bolza(
        "watch", *common, "--steps", "20", "--every", "5", "--controller", "csgd-layer", "--json", "w.json"
    )
    assert both.exit_code == 0, both.stderr
    assert "Controls" in both.stdout
    alone = bolza("train", *common, "--steps", "20", "--controller", "csgd-layer", "--json", "t.json")
    assert alone.exit_code == 0
    watched, plain = (json.loads((home / name).read_text())["run"] for name in ("w.json", "t.json"))
    assert watched["controls"] == plain["controls"] and watched["train_loss"] == plain["train_loss"]
