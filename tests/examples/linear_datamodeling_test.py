import json

import numpy as np

import keras_influence as ki
import linear_datamodeling
import problems


def tiny():
    problem = problems.digits(l2=0.1, num_subsets=12)
    train, queries = ((x[:n], y[:n]) for n, (x, y) in ((40, problem.train), (5, problem.queries)))
    return problem._replace(train=train, queries=queries, masks=problem.masks[:, :40])


def test_the_exact_inverse_predicts_what_gradients_alone_do_not(tmp_path):
    problem = tiny()
    bank = problem.bank(tmp_path / "bank").run()
    trained = linear_datamodeling.train(problem, tmp_path / "run")
    found = {
        name: linear_datamodeling.evaluate(
            linear_datamodeling.METHODS[name](trained), problem, bank.masks, bank.losses("loss")
        )
        for name in ("GradientDot", "ExactInfluence")
    }
    assert linear_datamodeling.METHODS["TracIn"](trained) is None
    assert found["ExactInfluence"]["lds"] > max(0.85, found["GradientDot"]["lds"])
    low, high = found["ExactInfluence"]["query_interval"]
    assert low <= found["ExactInfluence"]["lds"] <= high
    assert json.dumps(found)
    assert np.isfinite(found["GradientDot"]["seconds"])


def test_margins_are_predicted_by_influences_on_margins(tmp_path):
    problem = tiny()
    bank = problem.bank(tmp_path / "bank").run()
    trained = linear_datamodeling.train(problem, tmp_path / "run", "margin")
    exact = linear_datamodeling.METHODS["ExactInfluence"](trained)
    assert exact.measurement == "margin"
    losses = bank.losses("margin")
    found = linear_datamodeling.evaluate(exact, problem, bank.masks, losses)
    assert found["lds"] > 0.85


def test_datamodels_are_held_against_subsets_that_they_have_not_seen():
    # Outputs that are minus a sum over the subset of halving weights.
    random = np.random.default_rng(0)
    masks = random.random((80, 8)) < 0.5
    losses = -(masks @ 2.0 ** -np.arange(8))[:, np.newaxis] + 0.01 * random.standard_normal((80, 3))
    found = linear_datamodeling.evaluate_datamodels(masks, losses)
    assert found["lds"] > 0.95
    assert linear_datamodeling.evaluate_datamodels(masks, np.ones((80, 3))) is None


def test_every_method_has_a_row():
    named = " ".join(linear_datamodeling.METHODS)
    for name in ki.__all__:
        made = getattr(ki, name)
        if isinstance(made, type) and issubclass(made, ki.methods.InfluenceMethod):
            assert name in named
