"""The synchronous client."""

from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, overload

import grpc

from layercast.client.carrier import Carrier
from layercast.client.connection import DEFAULT_MAX_MESSAGE_BYTES, DEFAULT_TIMEOUT, DEFAULT_URL, Connection
from layercast.client.edits import Edit
from layercast.client.explaining import Targets
from layercast.client.many import DEFAULT_IN_FLIGHT, Errors, check_items
from layercast.client.operations import Operations
from layercast.client.question import Outputs
from layercast.client.security import File, authorization, channel_credentials
from layercast.client.streams import Items
from layercast.client.translation import Inputs
from layercast.client.types import ExplainOptions, Explanation, LayerInfo, ModelInfo, ModelMetadata
from layercast.proto.codec import AnyArray


class Client:
    """Calls a Layercast server, or any server of the Open Inference Protocol. Safe to share between threads.

        with Client("localhost:8001") as client:
            logits = client.predict("mnist", images)                         # [N, 10]
            maps = client.features("mnist", images, "net.*", reduce="mean")  # {"net.0@mean": ..., ...}
            why = client.explain("mnist", images, targets=7).attributions    # of the images' shape

    `timeout` is in seconds and covers a whole call; None waits for ever. A method's own `timeout` goes before it.
    `max_message_bytes` bounds requests and answers.

    With `tls`, or a URL `https://...`, the connection is encrypted and the server must have a certificate that the
    system trusts, or with `ca` (a PEM file) that authority. `certificate` and `key` (PEM files) are for a server that
    wants them of its callers, `token` for one that wants a token; without it the environment variable LAYERCAST_TOKEN
    is looked at. `credentials` replaces all of TLS's files by gRPC's own object; `headers` go along with every call.
    Errors are `LayercastError`s.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls: bool = False,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        credentials = credentials or channel_credentials(tls, ca, certificate, key)
        sent = {**authorization(token), **(headers or {})}
        self._operations = Operations()
        self._carrier = Carrier(Connection(url, timeout, max_message_bytes, credentials, sent), self._operations)

    @overload
    def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = ...,
        outputs: str,
        timeout: float | None = ...,
        id: str = ...,
    ) -> AnyArray: ...
    @overload
    def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = ...,
        outputs: list[str] | tuple[str, ...],
        timeout: float | None = ...,
        id: str = ...,
    ) -> dict[str, AnyArray]: ...
    @overload
    def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = ...,
        outputs: None = ...,
        timeout: float | None = ...,
        id: str = ...,
    ) -> Any: ...
    def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Outputs = None,
        timeout: float | None = None,
        id: str = "",
    ) -> AnyArray | dict[str, AnyArray]:
        """Run the model on a batch of rows.

        `inputs` is one array for a model with one input, else a dict of arrays by input name. Dimension 0 is the batch.
        An array is fitted to the declared datatype when that keeps its values (float64 becomes FP32, int64 becomes
        INT32 if it fits); otherwise InvalidArgument says what to convert.

        What comes back follows from `outputs`: a name gives that array; a list gives a dict, also for one name; None
        gives the array of a model that declares one output, and a dict of all outputs for any other model.
        """
        return self._carrier.run(self._operations.predict(model, inputs, version, outputs, id), timeout)

    def predict_many(
        self,
        model: str,
        items: Items,
        *,
        version: str = "",
        outputs: Outputs = None,
        errors: Errors = "raise",
        in_flight: int = DEFAULT_IN_FLIGHT,
        timeout: float | None = None,
    ) -> Generator[Any, None, None]:
        """Predictions for many items over one stream, in their order: an iterator of what `predict` returns for each.

        `items` is any iterable of inputs as `predict` takes them, single rows or small batches. It is consumed lazily:
        at most `in_flight` items, or `max_message_bytes` of them, are sent and not yet answered, and the next is taken
        only when no result is ready. An item that depends on the result before it wants `in_flight=1`.

        An item that fails alone raises its error, which ends the iteration; `error.answered` is its index. With
        `errors="return"` the error is the item's result, and the iteration goes on. A stream that breaks raises in
        both cases; its `error.answered` says how many results came. Nothing is sent again: the items after those may
        have run, or not. `timeout` is how long one answer may take, not the whole stream.

        Leaving the loop early closes the stream once the iterator is collected; its `close()` does so at once.
        """
        check_items(items, errors, in_flight)
        steps = self._operations.question(model, version, outputs)
        return self._carrier.many(iter(items), steps, errors, in_flight, timeout)

    def features(
        self,
        model: str,
        inputs: Inputs,
        layers: str | Sequence[str],
        *,
        reduce: str | None = None,
        outputs: str | Sequence[str] | None = None,
        version: str = "",
        timeout: float | None = None,
        id: str = "",
    ) -> dict[str, AnyArray]:
        """What layers inside the model computed for these rows, by layer name.

        `layers` are globs over the paths that `layers()` lists, each with an optional `@reducer` (`net.*@mean`);
        `reduce` is the reducer for those without: none, mean, max, cls, last, flatten, norm, fp16 or proj64, or several
        joined by @. `outputs` adds outputs of the model from the same forward; without them it stops after the deepest
        layer. The batch is dimension 0 of every array, the dtype is the layer's own or the reducer's. A glob that
        selects nothing and a reducer that does not fit are InvalidArgument; ResourceExhausted when the answer would not
        fit into a message: send fewer rows or layers, or reduce.
        """
        steps = self._operations.features(model, inputs, layers, reduce, outputs, version, id)
        return self._carrier.run(steps, timeout)

    def stream_features(
        self,
        model: str,
        inputs: Inputs,
        layers: str | Sequence[str],
        *,
        reduce: str | None = None,
        outputs: str | Sequence[str] | None = None,
        version: str = "",
        chunk_bytes: int = 0,
        timeout: float | None = None,
        id: str = "",
    ) -> Generator[dict[str, AnyArray], None, None]:
        """`features` for many rows or large layers: a dict for some rows at a time, in order, as they are computed.

        Joined along dimension 0 they are what `features` gives. Each is of about `chunk_bytes` (0: 2 MiB), or of one
        row where that is larger. The server computes little ahead of what is read; leaving the loop stops it.
        `timeout` covers all of it, the caller's own time between two dicts too.
        """
        steps = self._operations.stream_features(model, inputs, layers, reduce, outputs, version, chunk_bytes, id)
        return self._carrier.stream(model, steps, timeout)

    def steer(
        self,
        model: str,
        inputs: Inputs,
        edits: Edit | Sequence[Edit],
        *,
        outputs: str | Sequence[str] | None = None,
        layers: str | Sequence[str] = (),
        reduce: str | None = None,
        version: str = "",
        timeout: float | None = None,
        id: str = "",
    ) -> dict[str, AnyArray]:
        """What the model answers when layers are changed for these rows, by output (and layer) name.

        `edits` are made by the methods of `Edit`, those of one layer in the order given. `outputs` names those wanted,
        None for all. `layers` and `reduce` add layers of the changed forward, as in `features`; an edited one gives its
        edited values. Nobody else's rows are touched. The batch is dimension 0 of every array, the dtype the output's
        or the layer's own. PermissionDenied unless the operator allows it for the model (`steering = true`);
        InvalidArgument for an edit that does not fit, with its place.
        """
        steps = self._operations.steer(model, inputs, edits, outputs, layers, reduce, version, id)
        return self._carrier.run(steps, timeout)

    def explain(
        self,
        model: str,
        inputs: Inputs,
        method: str = "integrated-gradients",
        targets: Targets = None,
        *,
        output: str | None = None,
        input: str | None = None,
        version: str = "",
        timeout: float | None = None,
        id: str = "",
        **options: Unpack[ExplainOptions],
    ) -> Explanation:
        """How much each value of the inputs counts for what the model answers, row by row.

        `method` is saliency, input-x-gradient, smoothgrad, integrated-gradients, gradcam, occlusion or
        attention-rollout. `targets` is the class index to explain: one for all rows, one for each, or None for each
        row's largest output. `output` names the output that is explained (the first), `input` the input (the only
        float one, or the first). Token ids are explained through the Embedding that takes them.

        Options by name, each of some methods; what is left out is the method's default:
        `layer` (gradcam: a pattern that selects one layer; attention-rollout: one over the attention layers), `steps`
        (integrated-gradients), `baseline` (integrated-gradients, occlusion: a constant, for token ids a token id),
        `samples`, `noise` and `seed` (smoothgrad), `window` and `stride` (occlusion: one size, or one for each
        dimension that the window slides along), `upsample` (gradcam: False for a map of the layer's own size), `pool`
        (attention-rollout: mean, cls or last) and `residual` (its share of the residual connection).

        The answer's `attributions` have the input's shape; [N, T] for token ids; [N, H, W] for gradcam: see
        `Explanation`. A method, option, layer or target that does not fit is InvalidArgument with the nearest one;
        Unavailable when too many explanations wait. Papers: Simonyan et al. 2014 (saliency), Smilkov et al. 2017
        (smoothgrad), Sundararajan et al. 2017 (integrated gradients), Selvaraju et al. 2017 (Grad-CAM), Zeiler and
        Fergus 2014 (occlusion), Abnar and Zuidema 2020 (attention rollout).
        """
        named = output, input
        steps = self._operations.explain(model, inputs, method, targets, named, version, id, options)
        return self._carrier.run(steps, timeout)

    def layers(
        self, model: str, pattern: str = "*", *, version: str = "", timeout: float | None = None
    ) -> list[LayerInfo]:
        """The layers whose path matches the glob, in the order in which they finish."""
        return self._carrier.run(self._operations.layers(model, pattern, version), timeout)

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """Every model version in the server's repository, ready or not."""
        return self._carrier.run(self._operations.models(), timeout)

    def metadata(self, model: str, *, version: str = "", timeout: float | None = None) -> ModelMetadata:
        """Inputs, outputs, labels and preprocessing of a model, asked afresh."""
        return self._carrier.run(self._operations.metadata(model, version), timeout)

    def is_live(self, *, timeout: float | None = None) -> bool:
        """Does a server run here? False when none can be reached."""
        return self._carrier.run(self._operations.is_live(), timeout)

    def is_ready(self, *, timeout: float | None = None) -> bool:
        """Is the server there, with all its models loaded?"""
        return self._carrier.run(self._operations.is_ready(), timeout)

    def is_model_ready(self, model: str, *, version: str = "", timeout: float | None = None) -> bool:
        """Is the server there, and can this model answer now? False for an unknown model."""
        return self._carrier.run(self._operations.is_model_ready(model, version), timeout)

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled. The client cannot be used afterwards."""
        self._carrier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
