"""Averages of weights are kept by both trainers as by Keras's own `fit`."""

import keras
import numpy as np
import pytest
from duties import MSE, ONES, SGD, Scale, assert_close, batches, bilevel_trainer, data, meta_trainer, network, single

from keras_blur import learners, meta


def average(values, momentum):
    mean = values[0]
    for value in values[1:]:
        mean = momentum * mean + (1.0 - momentum) * value
    return mean


def test_averages_are_in_place_at_the_end():
    w, path = 0.0, []
    for _ in range(6):
        w -= 0.1 * 2.0 * (w - 1.0)
        path.append(w)
    model = single()
    made = bilevel_trainer(model, SGD(0.1, use_ema=True, ema_momentum=0.9))
    made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=8, epochs=6, verbose=0)
    assert model.get_weights()[0][0, 0] == pytest.approx(average(path, 0.9), abs=1e-6)


def test_averages_of_outer_parameters():
    seen, scale = [], Scale()
    made = bilevel_trainer(single(), SGD(0.1), SGD(1.0, use_ema=True, ema_momentum=0.5), scale)
    follow = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(scale.log_scale.numpy()))
    )
    made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=4, epochs=2, callbacks=[follow], verbose=0)
    assert seen[0] != seen[-1]
    assert float(scale.log_scale.numpy()) == pytest.approx(average(seen, 0.5), rel=1e-5)


def test_averages_of_meta_training(tmp_path):
    seen = []
    made = meta_trainer(keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5), members=2)
    follow = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(made.parameters(1)))
    save = meta.SaveLearned(tmp_path / "learned.keras")
    made.fit(2, 2, callbacks=[follow, save], verbose=0)
    for name, value in made.parameters(1).items():
        np.testing.assert_allclose(value, average([one[name] for one in seen], 0.5), rtol=1e-5, atol=1e-6)
    saved = made.learner.parameters(tmp_path / "learned.keras")
    assert_close([own[0] for own in saved.values()], made.parameters().values(), rtol=1e-6)


def test_averages_survive_a_step_that_is_skipped():
    made = meta_trainer(SGD(np.inf, use_ema=True), learner=learners.MAML(SGD(np.inf), (4,), loss="squared"))
    before = made.parameters()
    history = made.fit(1, 1, verbose=0).history
    assert history["skipped"] == [1.0]
    assert_close(made.parameters().values(), before.values(), rtol=0, atol=0)
    assert int(made.optimizer.iterations) == 0


def test_resumed_averages(tmp_path):
    path = str(tmp_path / "run.weights.h5")
    found = []
    for epochs in ((3,), (1, 3)):
        for number, end in enumerate(epochs):
            model = single()
            made = bilevel_trainer(model, SGD(0.1, use_ema=True, ema_momentum=0.9))
            made.fit(
                ONES, ONES, meta_data=(ONES, ONES), batch_size=4, epochs=end, verbose=0,
                checkpoint=path if len(epochs) > 1 else None,
            )  # fmt: skip
            assert number + 1 <= end
        found.append(model.get_weights()[0][0, 0])
    assert found[0] == found[1]


def test_averages_are_swapped_in_for_validation():
    x, y = data()
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    plain, model = network(), network()
    plain.compile(SGD(0.1, use_ema=True, ema_momentum=0.5), MSE, jit_compile=False)
    wanted = plain.fit(batches(x, y), validation_data=(x, y), epochs=2, callbacks=[swap], shuffle=False, verbose=0).history
    made = bilevel_trainer(model, SGD(0.1, use_ema=True, ema_momentum=0.5))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = made.fit(
        batches(x, y), meta_data=batches(x, y), validation_data=(x, y), epochs=2, callbacks=[swap], verbose=0
    ).history
    assert_close(model.get_weights(), plain.get_weights(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history["val_loss"], wanted["val_loss"], rtol=1e-5)
