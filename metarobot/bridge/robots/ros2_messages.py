"""The ROS 2 messages that the ROS 2 driver uses, as DDS types.

Names and fields are those of ROS 2's own packages (common_interfaces 5, Apache-2.0).
"""
# annotations are evaluated here, without ``from __future__ import annotations``: cyclonedds makes
# its types of them

from dataclasses import dataclass

from cyclonedds.idl import IdlStruct
from cyclonedds.idl.types import array, float64, int32, sequence, uint8, uint32


@dataclass
class Time(IdlStruct, typename="builtin_interfaces::msg::dds_::Time_"):
    """A point in time, s and ns."""

    sec: int32
    nanosec: uint32


@dataclass
class Header(IdlStruct, typename="std_msgs::msg::dds_::Header_"):
    """When and in which frame something was measured."""

    stamp: Time
    frame_id: str


@dataclass
class JointState(IdlStruct, typename="sensor_msgs::msg::dds_::JointState_"):
    """Joints in any order: rad, rad/s, N·m; what is not measured is left empty."""

    header: Header
    name: sequence[str]
    position: sequence[float64]
    velocity: sequence[float64]
    effort: sequence[float64]


@dataclass
class Quaternion(IdlStruct, typename="geometry_msgs::msg::dds_::Quaternion_"):
    """An orientation."""

    x: float64
    y: float64
    z: float64
    w: float64


@dataclass
class Vector3(IdlStruct, typename="geometry_msgs::msg::dds_::Vector3_"):
    """A vector."""

    x: float64
    y: float64
    z: float64


@dataclass
class Imu(IdlStruct, typename="sensor_msgs::msg::dds_::Imu_"):
    """Orientation in the world, rad/s and m/s² in the body's frame, with covariances."""

    header: Header
    orientation: Quaternion
    orientation_covariance: array[float64, 9]
    angular_velocity: Vector3
    angular_velocity_covariance: array[float64, 9]
    linear_acceleration: Vector3
    linear_acceleration_covariance: array[float64, 9]


@dataclass
class MultiArrayDimension(IdlStruct, typename="std_msgs::msg::dds_::MultiArrayDimension_"):
    """One axis of an array."""

    label: str
    size: uint32
    stride: uint32


@dataclass
class MultiArrayLayout(IdlStruct, typename="std_msgs::msg::dds_::MultiArrayLayout_"):
    """The axes of an array; empty for a plain list."""

    dim: sequence[MultiArrayDimension]
    data_offset: uint32


@dataclass
class Float64MultiArray(IdlStruct, typename="std_msgs::msg::dds_::Float64MultiArray_"):
    """A list of numbers, as forward_command_controller takes its commands."""

    layout: MultiArrayLayout
    data: sequence[float64]


@dataclass
class Float64(IdlStruct, typename="std_msgs::msg::dds_::Float64_"):
    """A number."""

    data: float64


@dataclass
class KeyValue(IdlStruct, typename="diagnostic_msgs::msg::dds_::KeyValue_"):
    """A detail of a diagnosis."""

    key: str
    value: str


@dataclass
class DiagnosticStatus(IdlStruct, typename="diagnostic_msgs::msg::dds_::DiagnosticStatus_"):
    """How one component is: level 0 is well, 1 a warning, 2 an error, 3 stale."""

    level: uint8
    name: str
    message: str
    hardware_id: str
    values: sequence[KeyValue]


@dataclass
class DiagnosticArray(IdlStruct, typename="diagnostic_msgs::msg::dds_::DiagnosticArray_"):
    """How some components are, as published on ``/diagnostics``."""

    header: Header
    status: sequence[DiagnosticStatus]


@dataclass
class LifecycleState(IdlStruct, typename="lifecycle_msgs::msg::dds_::State_"):
    """State of a lifecycle node: 1 unconfigured, 2 inactive, 3 active, 4 finalized."""

    id: uint8
    label: str


@dataclass
class NamedLifecycleState(
    IdlStruct, typename="controller_manager_msgs::msg::dds_::NamedLifecycleState_"
):
    """State of a controller or of a hardware component."""

    name: str
    state: LifecycleState


@dataclass
class ControllerManagerActivity(
    IdlStruct, typename="controller_manager_msgs::msg::dds_::ControllerManagerActivity_"
):
    """States of ros2_control's controllers and hardware, on ``/controller_manager/activity``."""

    header: Header
    controllers: sequence[NamedLifecycleState]
    hardware_components: sequence[NamedLifecycleState]
