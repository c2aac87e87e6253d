"""Every message class of the three .proto files: `from layercast.proto.messages import ModelInferRequest`.

The classes live in a descriptor pool of their own. Protobuf's default pool takes the `inference` package once per
process, and tritonclient, KServe and MLServer each put it there: whoever is imported second fails ("duplicate symbol
'inference.ServerLiveRequest'"). Classes of two pools are different types, so pass bytes, not messages, between them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

if TYPE_CHECKING:
    from layercast.proto.features_pb2 import *  # noqa: F403
    from layercast.proto.model_config_pb2 import *  # noqa: F403
    from layercast.proto.service_pb2 import *  # noqa: F403

POOL = DescriptorPool()


def _classes(file: FileDescriptorProto) -> dict[str, Any]:
    """Add the file to the pool; return its top-level message classes and enums by name."""
    POOL.Add(file)
    descriptor = POOL.FindFileByName(file.name)
    messages = {name: GetMessageClass(message) for name, message in descriptor.message_types_by_name.items()}
    enums = {name: EnumTypeWrapper(enum) for name, enum in descriptor.enum_types_by_name.items()}
    return {**messages, **enums}


# protoc writes files after those that they import, which is the order the pool wants.
for _file in FileDescriptorSet.FromString((Path(__file__).parent / "descriptors.binpb").read_bytes()).file:
    globals().update(_classes(_file))
