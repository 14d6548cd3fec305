"""What the capture of layer calls does to a model: nothing that lasts, and nothing unseen."""

import subprocess
import sys
import textwrap
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence import gradients
from keras_influence.gradients import Contraction, LossMaps, calls
from tests import cases

layers = keras.layers
WHOLE = "forward mode, whole network"
ALONE = "forward mode, this layer"


def _compiled(model):
    model.compile("sgd", cases.SPARSE)
    return model


def _batch(shape, num=4, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((num, *shape)).astype("float32"), random.integers(0, 3, num)


def _check(model, batch, tolerance=1e-5, maps=None):
    maps = maps or LossMaps(model)
    expected = cases.dense_gradients(model, cases.cross_entropy, *batch)
    directions = np.random.default_rng(1).standard_normal((4, maps.parameters.size))
    directions = directions.astype("float32")
    projected = expected @ directions.T
    actual = maps.project(batch, directions)
    np.testing.assert_allclose(actual, projected, rtol=0, atol=tolerance * np.abs(projected).max())
    norms = (expected**2).sum(1)
    np.testing.assert_allclose(
        maps.squared_norms(batch), norms, rtol=0, atol=tolerance * norms.max()
    )
    return maps


def _small():
    return _compiled(
        keras.Sequential(
            [keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(3)], name="small"
        )
    )


def _states(model):
    return [dict(layer.__dict__) for layer in calls.all_layers(model)]


def test_a_model_is_left_as_it_was():
    model = _small()
    batch = _batch((4,))
    model(batch[0])
    before = _states(model)
    _check(model, batch)
    assert _states(model) == before


def test_a_model_is_left_as_it_was_after_an_error():
    model = _small()
    x, y = _batch((4,))
    model(x)
    before = _states(model)
    with pytest.raises(ValueError, match="incompatible"):
        LossMaps(model).squared_norms((x[:, :3], y))
    assert _states(model) == before


def test_threads_that_use_the_model_meanwhile_are_not_seen():
    model = _small()
    x, _ = _batch((4,))
    expected = model(x).numpy()
    seen, others = [], []
    inside, done = threading.Event(), threading.Event()

    class Observer(calls.Observer):
        def call(self, layer, original, args, kwargs):
            seen.append(layer.name)
            if layer is model.layers[0]:
                inside.set()
                assert done.wait(30)
            return original(*args, **kwargs)

    def other():
        assert inside.wait(30)
        others.append(model(x).numpy())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with calls.observed(calls.all_layers(model), Observer()):
        model(x)
    thread.join()
    np.testing.assert_array_equal(others[0], expected)
    assert seen == ["small", *(layer.name for layer in model.layers)]


def test_threads_may_capture_the_same_model():
    model = _small()
    batches = [_batch((4,), seed=seed) for seed in range(4)]
    expected = [
        (cases.dense_gradients(model, cases.cross_entropy, *batch) ** 2).sum(1) for batch in batches
    ]
    found = [None] * 4

    def one(i):
        found[i] = LossMaps(model).squared_norms(batches[i]).numpy()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all("call" not in layer.__dict__ for layer in model.layers)


class OwnCall(keras.Model):
    """Uses the kernel of one of its layers where no layer's call can see it."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(4, "tanh")
        self.last = layers.Dense(3)

    def call(self, x):
        hidden = self.first(x)
        return self.last(hidden + tf.matmul(hidden, self.first.kernel))


def test_a_variable_used_by_the_model_itself_takes_the_whole_network():
    model = OwnCall()
    batch = _batch((4,))
    model(batch[0])
    maps = _check(_compiled(model), batch)
    served = {row.variable: row.rule for row in maps.coverage(batch).served}
    assert list(served.values()) == [WHOLE, "dense", "dense", "dense"]


def test_a_variable_used_by_the_loss_takes_the_whole_network():
    model = _small()
    kernel = model.layers[-1].kernel

    def loss(y, outputs):
        return cases.cross_entropy(tf.cast(y, tf.int32), outputs) + tf.reduce_sum(
            tf.square(kernel.value)
        )

    model.compile("sgd", loss)
    x, y = _batch((4,))
    maps = LossMaps(model)
    expected = cases.dense_gradients(model, loss, x, y)
    np.testing.assert_allclose(maps.example_gradients((x, y)), expected, atol=1e-5)
    np.testing.assert_allclose(maps.squared_norms((x, y)), (expected**2).sum(1), rtol=1e-5)
    assert [row.rule for row in maps.coverage((x, y)).served] == ["dense", "dense", WHOLE, "dense"]


def test_a_variable_that_nothing_uses_has_gradient_zero():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.spare, self.last = layers.Dense(2), layers.Dense(3)

        def build(self, shape):
            self.spare.build(shape)
            self.last.build(shape)

        def call(self, x):
            return self.last(x)

    model = Model()
    batch = _batch((4,))
    model(batch[0])
    maps = _check(_compiled(model), batch)
    assert maps.coverage(batch).served[0].rule == "unused"
    assert maps.coverage(batch).served[0].parameters == 8


def test_nested_models_and_frozen_layers():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, "gelu"), layers.Dense(4)])
    inner.layers[0].trainable = False
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(inner(inner(inputs)) + inputs))
    maps = _check(_compiled(model), _batch((4,)))
    assert len(maps.parameters.variables) == 4


def test_non_trainable_variables_that_are_chosen():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(3)]
    )
    batch = _batch((4,))
    normalization = model.layers[1]
    maps = LossMaps(_compiled(model), variables=[normalization.gamma, normalization.moving_mean])
    values = maps.parameters.values
    rows = []
    for i in range(4):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            outputs = model(batch[0][i : i + 1], training=False)
            loss = cases.cross_entropy(batch[1][i : i + 1], outputs)
        rows.append(np.concatenate(tape.gradient(loss, values)))
    np.testing.assert_allclose(maps.example_gradients(batch), rows, atol=1e-6)
    assert set(maps.coverage(batch).shares()) == {"batch normalization", ALONE}


def test_rematerialised_layers():
    with keras.RematScope(mode="full"):
        convolution = layers.Conv2D(2, 3, activation="tanh")
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), convolution, layers.Flatten(), layers.Dense(3)]
    )
    batch = _batch((4, 4, 1))
    mode = convolution._remat_mode
    assert mode is not None
    maps = _check(_compiled(model), batch)
    assert set(maps.coverage(batch).shares()) == {"conv", "dense"}
    assert convolution._remat_mode is mode


def test_quantised_layers_give_what_their_tapes_give():
    model = _small()
    batch = _batch((4,))
    model.quantize("int8")
    maps = _check(_compiled(model), batch)
    assert set(maps.coverage(batch).shares()) == {ALONE}
    assert maps.parameters.size == 8  # The biases: quantised kernels are integers.


def test_low_rank_weights_of_a_quantised_layer():
    model = _small()
    batch = _batch((4,))
    layer = model.layers[0]
    layer.enable_lora(2)
    layer.quantize("int8")
    layer.lora_kernel_b.assign(np.random.default_rng(0).standard_normal((2, 5)))
    maps = _check(_compiled(model), batch)
    assert set(maps.coverage(batch).shares()) == {ALONE, "dense"}


def test_a_model_of_one_batch_size_takes_the_whole_network(caplog):
    model = _compiled(
        keras.Sequential(
            [
                keras.Input((5, 2), batch_size=4),
                layers.SimpleRNN(3, stateful=True),
                layers.Dense(3),
            ]
        )
    )
    batch = _batch((5, 2))
    maps = LossMaps(model)
    coverage = maps.coverage(batch)
    assert set(coverage.shares()) == {WHOLE}
    assert "batch" in coverage.reason
    assert "cannot be seen" in caplog.text


def test_half_precision_agrees_with_full():
    def build():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.Conv2D(4, 3, activation="tanh"),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )

    full = _compiled(build())
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = _compiled(build())
    finally:
        keras.config.set_dtype_policy("float32")
    batch = _batch((6, 6, 2))
    directions = np.random.default_rng(1).standard_normal((5, 279)).astype("float32")
    maps = LossMaps(half)
    projected = maps.project(batch, directions)
    assert projected.dtype == tf.float32
    assert set(maps.coverage(batch).shares()) == {"conv", "dense", "batch normalization"}
    expected = LossMaps(full).project(batch, directions).numpy()
    np.testing.assert_allclose(projected, expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize("given", [Contraction(order="sideways"), Contraction(budget=0)])
def test_an_unknown_contraction_is_refused(given):
    with pytest.raises(ValueError, match=r"`order` must be one of .*`budget` above zero"):
        LossMaps(_small(), contraction=given)


def test_contraction_in_bfloat16():
    model = _compiled(
        keras.Sequential(
            [keras.Input((6, 6, 2)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)]
        )
    )
    batch = _batch((6, 6, 2))
    directions = np.random.default_rng(1).standard_normal((5, 271)).astype("float32")
    exact = LossMaps(model).project(batch, directions).numpy()
    low = LossMaps(model, contraction=Contraction(dtype=tf.bfloat16)).project(batch, directions)
    # Eight bits of mantissa in factors and results.
    error = np.abs(low - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 2e-2


class _Scale(layers.Layer):
    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.gain


class _Doubled(_Scale):
    def call(self, x):
        return 2.0 * x * self.gain


def _scaled(cls):
    return _compiled(
        keras.Sequential([keras.Input((5, 4)), cls(), layers.Flatten(), layers.Dense(3)])
    )


def test_a_rule_of_the_users_own_serves_its_class_and_not_one_that_computes_otherwise(monkeypatch):
    registry = dict(gradients.rules.registry._rules)
    monkeypatch.setattr("keras_influence.gradients.rules.registry._rules", registry)
    batch = _batch((5, 4))
    maps = _check(_scaled(_Scale), batch)
    assert maps.coverage(batch).served[0].rule == ALONE

    @gradients.register_rule(_Scale)
    def my_scale(call):
        product = call.output_gradient * call.inputs
        yield call.layer.gain, gradients.Explicit(tf.reduce_sum(product, axis=1))

    maps = _check(_scaled(_Scale), batch)
    assert maps.coverage(batch).served[0].rule == "my scale"
    maps = _check(_scaled(_Doubled), batch)
    assert maps.coverage(batch).served[0].rule == ALONE

    @gradients.register_rule(_Scale)
    def wrong(call):
        yield call.layer.gain, gradients.Explicit(call.inputs)

    with pytest.raises(ValueError, match=r"'wrong' gives gradients of shape \(5, 4\) for .*\(4,\)"):
        LossMaps(_scaled(_Scale)).squared_norms(batch)


@pytest.mark.parametrize(
    ("layers_given", "error"), [((), "needs the layer classes"), ((int,), "Expected a class")]
)
def test_a_rule_needs_layers(layers_given, error):
    with pytest.raises((TypeError, ValueError), match=error):
        gradients.register_rule(*layers_given)


def test_slow_fallbacks_are_named_once(caplog):
    class Slow(layers.Layer):
        def build(self, shape):
            self.matrix = self.add_weight(shape=(shape[-1], shape[-1]), name="matrix")

        def call(self, x):
            return tf.tanh(x @ self.matrix)

    model = _compiled(keras.Sequential([keras.Input((4,)), Slow(name="slow_one"), layers.Dense(3)]))
    maps = LossMaps(model)
    batch = _batch((4,))
    maps.squared_norms(batch)
    maps.squared_norms(_batch((4,), num=2))
    assert caplog.text.count("have no rule") == 1
    assert "slow_one" in caplog.text
    assert "52% of the parameters" in caplog.text  # 16 of 31.


def test_it_runs_eagerly_too():
    model = _small()
    batch = _batch((4,))
    tf.config.run_functions_eagerly(True)
    try:
        _check(model, batch)
    finally:
        tf.config.run_functions_eagerly(False)


class _Centred(layers.Layer):
    def call(self, x):
        return x - tf.reduce_mean(x, axis=0)


def _contrastive(y, outputs):
    scores = outputs @ tf.transpose(outputs)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(tf.shape(outputs)[0]), scores)


@pytest.mark.parametrize(
    ("body", "loss", "named"),
    [
        (lambda: _Centred(name="centred"), cases.SPARSE, r"the layer 'centred' \(_Centred\)"),
        (lambda: layers.Activation("tanh"), _contrastive, "the loss"),
    ],
)
def test_what_mixes_examples_is_refused_by_name(body, loss, named):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), body(), layers.Dense(3)])
    model.compile("sgd", loss)
    with pytest.raises(ValueError, match=f"mixed by {named}"):
        LossMaps(model).check_separate(_batch((4,)))
    LossMaps(model).check_separate(_batch((4,), num=1))


def test_what_does_not_mix_them_passes():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    LossMaps(_compiled(model)).check_separate(_batch((6, 6, 2)))


@pytest.mark.slow
def test_two_mirrored_replicas():
    program = """
        import numpy as np
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        half = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [half, half])
        import keras
        from keras_influence.gradients import LossMaps
        from tests import cases

        class Custom(keras.layers.Layer):
            def build(self, shape):
                self.matrix = self.add_weight(shape=(shape[-1], shape[-1]))

            def call(self, x):
                return tf.tanh(x @ self.matrix)

        def build():
            keras.utils.set_random_seed(0)
            model = keras.Sequential([
                keras.Input((6, 6, 1)),
                keras.layers.Conv2D(3, 3, activation="tanh"),
                keras.layers.BatchNormalization(),
                keras.layers.Flatten(),
                keras.layers.Dense(5),
                Custom(),
                keras.layers.Dense(3),
            ])
            model.compile("sgd", cases.SPARSE)
            return LossMaps(model)

        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            mirrored = build()
        single = build()
        random = np.random.default_rng(0)
        x, y = random.standard_normal((8, 6, 6, 1)).astype("f"), random.integers(0, 3, 8)

        def share(array):
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(array[4 * context.replica_id_in_sync_group :][:4])
            )

        for count in (1, 5):
            directions = random.standard_normal((count, single.parameters.size)).astype("f")
            results = strategy.run(
                lambda batch: mirrored.project(batch, directions), args=((share(x), share(y)),)
            )
            found = tf.concat(strategy.experimental_local_results(results), axis=0)
            expected = single.project((x, y), directions).numpy()
            np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
        assert "forward mode, whole network" not in mirrored.known_coverage.shares()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_loss_that_goes_past_the_activation_to_its_logits(activation):
    # Keras computes a cross-entropy from what entered the softmax, not from what left it.
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="float64"),
            keras.layers.Dense(5, "tanh", dtype="float64"),
            keras.layers.Dense(3, activation, dtype="float64"),
        ]
    )
    loss = {"softmax": "categorical_crossentropy", "sigmoid": "binary_crossentropy"}[activation]
    model.compile("sgd", loss)
    random = np.random.default_rng(0)
    batch = (random.standard_normal((6, 4)), np.eye(3)[random.integers(0, 3, 6)])
    maps = LossMaps(model)
    directions = random.standard_normal((3, maps.parameters.size))
    np.testing.assert_allclose(
        maps.project(batch, directions), maps.forward_project(batch, tf.constant(directions)), 1e-10
    )
    assert {row.rule for row in maps.coverage(batch).served} == {"dense"}
    assert len(maps.coverage(batch).linear) == 2
