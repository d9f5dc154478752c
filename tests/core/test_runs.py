"""Checkpoint names, the choice of members, and the event log."""

from __future__ import annotations

from fastflower.core import runs


def test_member_names_round_trip():
    run = runs.Run(exp="flower", backbone="convnextv2_base.fcmae_ft_in22k_in1k", fold=3, seed=42)
    path = run.checkpoint_path("best_combo", 17, 0.91236)
    assert path.as_posix() == (
        "results/model/flower/best_combo__convnextv2_base.fcmae_ft_in22k_in1k__fold3_seed42_epoch17_score0.9124.pth"
    )
    name = runs.parse_member(path)
    assert (name.kind, name.backbone, name.fold, name.seed, name.epoch, name.score) == (
        "best_combo", "convnextv2_base.fcmae_ft_in22k_in1k", 3, 42, 17, 0.9124
    )  # fmt: skip
    assert runs.parse_member(path.with_name("best_combo.pth")) is None
    assert runs.parse_member(path.with_name("other" + path.name)) is None


def test_find_members_takes_the_newest_epoch_once(tmp_path):
    names = [
        ("best_combo", 0, 3, 0.5), ("best_combo", 0, 12, 0.6), ("last", 0, 14, 0.7), ("best_combo", 1, 9, 0.4)
    ]  # fmt: skip
    for kind, fold, epoch, score in names:
        path = runs.Run(exp="e", backbone="net", fold=fold, seed=1).checkpoint_path(kind, epoch, score)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    pattern = "results/model/best_combo__*fold*_seed*_epoch*_score*.pth"
    members = runs.find_members("e", pattern, metric="combo")
    assert [(runs.parse_member(p).fold, runs.parse_member(p).epoch) for p in members] == [(0, 12), (1, 9)]
    assert [p.name for p in runs.Run(exp="e", backbone="net", fold=0, seed=1).checkpoints("best_combo")] == [
        "best_combo__net__fold0_seed1_epoch3_score0.5000.pth", "best_combo__net__fold0_seed1_epoch12_score0.6000.pth"
    ]  # fmt: skip


def test_members_are_the_best_of_the_metric_and_never_last_unless_it_is_named(tmp_path):
    fold_kinds = [
        ("best_clean", "best_combo", "ema_best", "last", "soup"),
        ("ema_best", "swa", "last"),
        ("last",),
    ]
    for fold, kinds in enumerate(fold_kinds):
        for epoch, kind in enumerate(kinds, 1):
            path = runs.Run(exp="e", backbone="net", fold=fold, seed=1).checkpoint_path(kind, epoch, 0.5)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def kinds(pattern: str, metric: str) -> list[str]:
        return [runs.parse_member(path).kind for path in runs.find_members("e", pattern, metric=metric)]

    assert kinds("auto", "clean") == ["best_clean"] and kinds("auto", "combo") == ["best_combo"]
    assert kinds("*.pth", "clean") == kinds("*", "clean") == ["best_clean", "ema_best"]
    assert kinds("*.pth", "combo") == ["best_combo", "ema_best"]
    assert kinds("*fold1*", "combo") == ["ema_best"] and kinds("*fold2*", "combo") == []
    assert kinds("last__*", "combo") == ["last"] * 3 and kinds("soup__*", "combo") == ["soup"]


def test_the_last_row_of_an_epoch_counts_and_incomplete_lines_are_dropped(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    for epoch, loss in ((1, 2.0), (2, 1.5), (2, 1.25)):
        runs.append_event(path, {"event": "epoch", "fold": 0, "seed": 1, "epoch": epoch, "loss": loss})
    with open(path, "a") as file:
        file.write('{"event": "epoch", "fo')
    notices: list[str] = []
    assert [(row["epoch"], row["loss"]) for row in runs.read_events(path, notices)] == [(1, 2.0), (2, 1.25)]
    assert notices == [
        f"{path}: 1 of its rows are damaged, cut by a kill, or of an earlier version; they are left out"
    ]
    runs.append_event(path, {"event": "end", "fold": 0})  # not joined to the row that was cut
    assert runs.read_events(path, [])[-1] == {"event": "end", "fold": 0}
    assert runs.read_events(tmp_path / "none", []) == []


def test_a_changed_bit_of_an_event_is_noticed(tmp_path):
    path = tmp_path / "events.jsonl"
    for epoch in (1, 2):
        runs.append_event(
            path, {"event": "epoch", "fold": 0, "epoch": epoch, "name": "花 \x1b[31m", "loss": None}
        )
    content, rows = path.read_bytes(), runs.read_events(path, [])
    for bit in range(0, 8 * len(content), 3):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        notices: list[str] = []
        assert runs.read_events(path, notices) == rows or len(notices) == 1
