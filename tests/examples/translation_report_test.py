import runs
import translation_report


def test_costs_stand_beside_what_was_published(tmp_path):
    cost = {
        "fit_seconds": 12.4,
        "pairs_per_hour": 45_000.0,
        "tokens_per_second": 430.0,
        "peak_bytes": 2.5e9,
        "flops_per_pair": 955e6,
    }
    runs.write_json(tmp_path / "arnoldi-all.json", cost)
    *_, row, published = translation_report.format_costs(tmp_path).splitlines()
    assert row.split() == ["arnoldi-all", "12", "45,000", "430", "2,500", "955"]
    assert published == "published, on 32 TPU v2 cores: 2,200,000 pairs/h"


def test_results_as_text():
    found = {
        "num_noisy": 300,
        "num_pairs": 5000,
        "retrieval": [{"score": "tracin", "auc": 0.951, "average_precision": 0.6}],
        "selection": [{"method": "none", "share": 1.0, "noisy_share": 0.06, "bleu": 3.456}],
        "bleu": {"bleu": 12.3, "signature": "nrefs:1"},
        "forward_mode": {"ratio": 7.77, "num_pairs": 128},
    }
    lines = translation_report.format_results(found).splitlines()
    assert lines[0] == "300 wrong references of 5000 pairs"
    assert lines[3].split() == ["tracin", "95.1", "60.0"]
    assert lines[6].split() == ["none", "100.0%", "6.0%", "3.46"]
    assert lines[7:] == [
        "BLEU of the model that scored: 12.30",
        "nrefs:1",
        "7.8 times the rate of forward mode through the whole network, on 128 pairs",
    ]
