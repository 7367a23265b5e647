"""The look of every picture: one sky, floor and light for any family's model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metarobot.render.opengl import opengl_context
from metarobot.types import Floats

Pixels = NDArray[np.uint8]
"""A picture, ``(height, width, 3)``."""

OVERSAMPLE = 2
"""Pixels are drawn this many times finer along each side, then averaged: cheaper in software than
OpenGL's own smoothing."""
MOST_GEOMS = 2000
"""Geoms that a scene may show, shadows included."""

# Sky.
ZENITH_RGB = (86, 142, 196)
HORIZON_RGB = (226, 235, 241)
HILL_ROWS = (
    (0.075, (188, 205, 219)),
    (0.035, (160, 184, 204)),
)
"""Rows of hills, far ones first: mean height as the sine of elevation, and colour."""
EMPTY_RGB = np.array([0, 0, 0], np.uint8)
"""What OpenGL leaves where there is nothing; the sky is put there."""

# Floor.
TILE_RGB = ((112, 131, 146), (128, 147, 161))
TILE_LINE_RGB = (168, 184, 195)
TEXTURE_SIZE_PX = 512
TEXTURE_SIZE_M = 2.0

# Robot.
TRUNK_RGBA = (0.93, 0.93, 0.95, 1.0)
LIMB_RGBA = (
    (0.96, 0.45, 0.14, 1.0),
    (0.13, 0.55, 0.60, 1.0),
    (0.95, 0.72, 0.18, 1.0),
    (0.48, 0.42, 0.70, 1.0),
)

# Light.
LIGHT_DIRECTION = np.array([0.3, 0.35, -1.0])
SHADOW_RGBA = np.array([0.10, 0.14, 0.18, 0.3], np.float32)
SHADOW_HEIGHT_M = 0.004
"""Shadows lie this high above the floor, so that they are seen."""
SHADOW_THICKNESS = 0.01
"""Share of its height that a flattened shape keeps: none at all could not be drawn."""

# Camera.
TILT_RAD = 0.19
"""Angle at which the camera looks down."""
SIDE_OFFSET = 0.12
"""The camera looks ahead by this much of the distance to its side."""
DISTANCE_PER_RADIUS = 2.5
"""Distance of the camera, in radii of what it shows."""
DISTANCE_PER_HALF_HEIGHT = 3.6
"""Distance of the camera at least, in half heights of what it shows."""

STATE_SPEC = mujoco.mjtState.mjSTATE_INTEGRATION.value


def up_direction(model: mujoco.MjModel) -> Floats:
    """Return the direction against gravity in the model's axes.

    It is not z in a model of a slope, whose gravity is turned.
    """
    norm = float(np.linalg.norm(model.opt.gravity))
    if norm == 0:
        return np.array([0.0, 0.0, 1.0])
    return np.asarray(-model.opt.gravity / norm)


# ---------------------------------------------------------------------------------------------
# The visual style of a model
# ---------------------------------------------------------------------------------------------


def apply_visual_style(spec: mujoco.MjSpec) -> mujoco.MjSpec:
    """Give a model our floor, lights and colours, and no sky; its physics stays as it was."""
    skyboxes = [t for t in spec.textures if t.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX]
    for element in (*spec.lights, *skyboxes):
        spec.delete(element)
    _style_floor(spec)
    _style_robot(spec)

    spec.worldbody.add_light(
        name="studio_key",
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        dir=LIGHT_DIRECTION,
        diffuse=[0.62, 0.60, 0.56],
        specular=[0.3, 0.3, 0.3],
        castshadow=True,
    )
    headlight = spec.visual.headlight
    headlight.ambient = [0.42, 0.43, 0.46]
    headlight.diffuse = [0.22, 0.22, 0.22]
    headlight.specular = [0.05, 0.05, 0.05]
    return spec


def _style_floor(spec: mujoco.MjSpec) -> None:
    """Tile planes and height fields, and make planes endless."""
    texture = spec.add_texture(name="studio_floor", type=mujoco.mjtTexture.mjTEXTURE_2D, nchannel=3)
    texture.width = TEXTURE_SIZE_PX
    texture.height = TEXTURE_SIZE_PX
    texture.data = _floor_texture().tobytes()

    repeats_per_m = 1 / TEXTURE_SIZE_M
    material = spec.add_material(
        name="studio_floor", texuniform=True, texrepeat=[repeats_per_m, repeats_per_m]
    )
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "studio_floor"
    material.specular = 0.1
    material.shininess = 0.1
    material.reflectance = 0.0

    for geom in spec.worldbody.geoms:
        if geom.type in (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_HFIELD):
            geom.material = "studio_floor"
            geom.rgba = [1, 1, 1, 1]
        if geom.type == mujoco.mjtGeom.mjGEOM_PLANE:
            geom.size[:2] = 0  # rendered without end


def _floor_texture() -> Pixels:
    """Draw two by two squares of a metre, a fine line every half metre."""
    metre = TEXTURE_SIZE_PX // 2
    half_metre = TEXTURE_SIZE_PX // 4
    row, column = np.indices((TEXTURE_SIZE_PX, TEXTURE_SIZE_PX))

    checkerboard = (row // metre + column // metre) % 2
    texture = np.array(TILE_RGB, float)[checkerboard]

    # Pixels of lines: 2 wide every half metre, 4 wide every metre.
    on_fine_line = np.minimum((row + 1) % half_metre, (column + 1) % half_metre) < 2
    on_line = np.minimum((row + 2) % metre, (column + 2) % metre) < 4
    faded = 0.75 * texture + 0.25 * np.array(TILE_LINE_RGB)
    texture = np.where(on_fine_line[..., None], faded, texture)
    texture = np.where(on_line[..., None], TILE_LINE_RGB, texture)
    return texture.astype(np.uint8)


def _style_robot(spec: mujoco.MjSpec) -> None:
    """Paint the plain shapes of what actuators move: the trunk light, each limb a colour.

    Meshes, and loads that are welded to the trunk, keep their colours.
    """
    actuated_joints = {actuator.target for actuator in spec.actuators}
    for body in spec.worldbody.bodies:
        if not any(joint.name in actuated_joints for joint in _joints_of_tree(body)):
            continue
        _paint(body, TRUNK_RGBA)
        limbs = [child for child in body.bodies if any(_joints_of_tree(child))]
        for i, limb in enumerate(limbs):
            _paint_tree(limb, LIMB_RGBA[i % len(LIMB_RGBA)])


def _joints_of_tree(body: Any) -> Iterator[Any]:
    """Yield the joints of a body and of all bodies below it."""
    yield from body.joints
    for child in body.bodies:
        yield from _joints_of_tree(child)


def _paint_tree(body: Any, rgba: tuple[float, ...], depth: int = 0) -> None:
    """Paint a body and those below it, lighter with every joint outward."""
    share_of_white = 0.16 * min(depth, 3)
    _paint(body, tuple(value + (1 - value) * share_of_white for value in rgba))
    for child in body.bodies:
        _paint_tree(child, rgba, depth + 1)


def _paint(body: Any, rgba: tuple[float, ...]) -> None:
    for geom in body.geoms:
        if geom.type != mujoco.mjtGeom.mjGEOM_MESH:
            geom.material = ""
            geom.rgba = rgba


def paint_sky(rays: Floats, up: Floats) -> Pixels:
    """Draw haze, two rows of hills and blue sky, as seen along rays ``(height, width, 3)``."""
    horizon = np.array(HORIZON_RGB)
    elevation = rays @ up  # sine of the angle above the horizon
    azimuth = np.arctan2(rays[..., 0], rays[..., 1])

    blend = np.clip(elevation / 0.45, 0, 1)[..., None] ** 0.7
    sky = (1 - blend) * horizon + blend * np.array(ZENITH_RGB)

    for k, (mean_height, colour) in enumerate(HILL_ROWS):
        height = (
            mean_height
            + 0.016 * np.sin(5 * azimuth + 2 * k)
            + 0.009 * np.sin(13 * azimuth + k)
            + 0.004 * np.sin(31 * azimuth)
        )
        blend = np.clip(elevation / height, 0, 1)[..., None] ** 0.8
        hill = (1 - blend) * horizon + blend * np.array(colour)
        sky = np.where((elevation < height)[..., None], hill, sky)
    return np.asarray(sky.round(), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """What pictures of a model show."""

    trunk: int
    """Body to follow; −1 if nothing in the model travels."""
    centre: Floats
    """Middle of all but the floor, at the model's initial state."""
    radius: float
    """Half the diagonal of the box around it, m."""
    distance: float
    """Distance of the camera, m."""


class Scene:
    """One task's visual model, drawn on an OpenGL context that all scenes share."""

    def __init__(
        self,
        model: mujoco.MjModel,
        width: int,
        height: int,
        view: tuple[tuple[float, float, float], float] | None = None,
    ) -> None:
        """Prepare to draw ``width`` times ``height`` pixels.

        ``view`` fixes the centre and radius of what is shown; if None, the robot is followed.
        """
        self.model = model
        self.data = mujoco.MjData(model)
        self._viewport = mujoco.MjrRect(0, 0, OVERSAMPLE * width, OVERSAMPLE * height)
        self._up = up_direction(model)

        subject = _find_subject(model, self.data)
        if view is not None:
            centre, radius = view
            distance = DISTANCE_PER_RADIUS * radius
            subject = Subject(-1, np.array(centre), radius, distance)
        self.radius = subject.radius
        self._subject = subject

        planes = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE)
        self._floor = int(planes[0]) if len(planes) else -1
        self._set_visual_options(model)

        opengl_context().make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=MOST_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_FOG] = True
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        # Shadow maps are slow: on a plane, shadows are shapes of their own (_add_shadows).
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self._floor < 0
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()

        # The camera looks from the side, a little ahead and down, upright in the world outside.
        side = np.array([SIDE_OFFSET, 1.0, 0.0])
        side = side - (side @ self._up) * self._up
        side /= np.linalg.norm(side)
        self._camera_forward = np.cos(TILT_RAD) * side - np.sin(TILT_RAD) * self._up
        self._camera_up = np.cos(TILT_RAD) * self._up + np.sin(TILT_RAD) * side
        self._sky = paint_sky(self._rays_to_sky(self._pixel_rays()), self._up)

    def _set_visual_options(self, model: mujoco.MjModel) -> None:
        options = model.vis
        options.global_.offwidth = self._viewport.width
        options.global_.offheight = self._viewport.height
        options.quality.offsamples = 0  # OVERSAMPLE smooths instead
        options.quality.shadowsize = 1024

        # The distances below are multiples of the extent.
        model.stat.extent = self.radius
        options.map.znear = 0.05
        options.map.zfar = 80.0
        options.map.shadowclip = 2.0
        options.map.fogstart = 5.0
        options.map.fogend = 30.0
        options.rgba.fog[:3] = np.array(HORIZON_RGB) / 255
        options.rgba.fog[3] = 1

    def _pixel_rays(self) -> Floats:
        """Return the unit vector that each pixel looks along, ``(height, width, 3)``."""
        height = self._viewport.height
        width = self._viewport.width
        field_of_view = np.radians(self.model.vis.global_.fovy)
        scale = np.tan(field_of_view / 2) / (height / 2)
        x = (np.arange(width) + 0.5 - width / 2) * scale
        y = (height / 2 - np.arange(height) - 0.5) * scale

        right = np.cross(self._camera_forward, self._camera_up)
        rays = self._camera_forward + x[None, :, None] * right + y[:, None, None] * self._camera_up
        return np.asarray(rays / np.linalg.norm(rays, axis=-1, keepdims=True))

    def _rays_to_sky(self, rays: Floats) -> Floats:
        """Leave out the lower rows of a picture, where nothing but the near floor is seen."""
        if self._floor < 0:
            return rays
        floor_normal = self.data.geom_xmat[self._floor].reshape(3, 3)[:, 2]
        near_horizon = (rays @ floor_normal > -0.1).any(axis=1)
        rows_below = int(np.argmax(near_horizon[::-1]))
        return rays[: len(rays) - rows_below]

    def look(self) -> Floats:
        """Return the robot's centre of mass; the middle of the scene if nothing travels."""
        subject = self._subject
        if subject.trunk < 0:
            return subject.centre.copy()
        return np.asarray(self.data.subtree_com[subject.trunk]).copy()

    def load(self, state: Floats) -> None:
        """Load a full integration state, and compute what drawing needs of it."""
        mujoco.mj_setState(self.model, self.data, state, STATE_SPEC)
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def draw(self, look: Floats) -> Pixels:
        """Take a picture of the place ``look`` from the side, ``(height, width, 3)`` uint8."""
        opengl_context().make_current()
        self._update_scene(look)

        # Scenes share the OpenGL context: what was drawn last may have been another's.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        pixels = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, self._viewport, self._context)
        pixels = pixels[::-1]  # OpenGL's first row is the lowest

        upper_rows = pixels[: len(self._sky)]
        empty = (upper_rows == EMPTY_RGB).all(axis=-1, keepdims=True)
        np.copyto(upper_rows, self._sky, where=empty)
        return np.asarray(Image.fromarray(pixels).reduce(OVERSAMPLE))

    def _update_scene(self, look: Floats) -> None:
        """Put all geoms, lights and shadows where they are now, and the camera before ``look``."""
        camera = self._camera
        camera.lookat = look
        camera.distance = self._subject.distance
        camera.azimuth = 90.0
        camera.elevation = -np.degrees(TILT_RAD)
        everything = mujoco.mjtCatBit.mjCAT_ALL.value

        # MuJoCo lays an endless floor around where the scene was last seen from, and then sets the
        # eyes from the camera, which cannot be tilted as gravity is: they are placed before and
        # after.
        self._place_eyes(look)
        mujoco.mjv_updateScene(
            self.model, self.data, self._option, None, camera, everything, self._scene
        )
        self._place_eyes(look)

        for light in self._scene.lights[1 : self._scene.nlight]:  # the first is the headlight
            light.pos[:] = look - 3.0 * self.radius * np.array(light.dir)
        if self._floor >= 0:
            self._add_shadows()

    def _place_eyes(self, look: Floats) -> None:
        for eye in self._scene.camera:
            eye.pos[:] = look - self._subject.distance * self._camera_forward
            eye.forward[:] = self._camera_forward
            eye.up[:] = self._camera_up

    def _add_shadows(self) -> None:
        """Add each shape once more, flattened along the light onto the floor.

        It takes a tenth of the time of shadow maps.
        """
        normal = self.data.geom_xmat[self._floor].reshape(3, 3)[:, 2]
        origin = self.data.geom_xpos[self._floor] + SHADOW_HEIGHT_M * normal
        # Projection along the light l onto the plane of normal n: I − l nᵀ / (n · l)
        projection = np.outer(LIGHT_DIRECTION, normal) / (normal @ LIGHT_DIRECTION)
        flatten = np.eye(3) - (1 - SHADOW_THICKNESS) * projection

        scene = self._scene
        for i in range(scene.ngeom):
            geom = scene.geoms[i]
            if scene.ngeom >= scene.maxgeom or not self._casts_shadow(geom):
                continue
            shadow = scene.geoms[scene.ngeom]
            position = origin + flatten @ (np.array(geom.pos) - origin)
            orientation = (flatten @ geom.mat).ravel()
            mujoco.mjv_initGeom(shadow, geom.type, np.ones(3), position, orientation, SHADOW_RGBA)
            shadow.size[:] = geom.size
            shadow.dataid = geom.dataid
            shadow.category = mujoco.mjtCatBit.mjCAT_DECOR.value
            scene.ngeom += 1

    def _casts_shadow(self, geom: mujoco.MjvGeom) -> bool:
        """Return whether a geom belongs to a body of the model, and not to the world itself."""
        is_geom = geom.objtype == mujoco.mjtObj.mjOBJ_GEOM
        return bool(is_geom and self.model.geom_bodyid[geom.objid] > 0)

    def close(self) -> None:
        """Free what the scene holds on the graphics card."""
        opengl_context().make_current()
        self._context.free()


def _find_subject(model: mujoco.MjModel, data: mujoco.MjData) -> Subject:
    """Find the trunk to follow, and the middle and size of all but the floor."""
    mujoco.mj_forward(model, data)
    geoms = [geom for geom in range(model.ngeom) if model.geom_bodyid[geom] > 0]
    if not geoms:
        geoms = list(range(model.ngeom))
    radii = model.geom_rbound[geoms, None]
    low = (data.geom_xpos[geoms] - radii).min(axis=0)
    high = (data.geom_xpos[geoms] + radii).max(axis=0)
    radius = float(np.linalg.norm(high - low) / 2)
    half_height = float(high[2] - low[2]) / 2

    # Bodies that actuators move.
    joint_transmissions = (
        mujoco.mjtTrn.mjTRN_JOINT.value,
        mujoco.mjtTrn.mjTRN_JOINTINPARENT.value,
    )
    on_joints = np.isin(model.actuator_trntype, joint_transmissions)
    actuated_joints = model.actuator_trnid[on_joints, 0]
    actuated_bodies = model.jnt_bodyid[actuated_joints]

    # Bodies that travel, by a free joint or sliding joints.
    travelling_types = (mujoco.mjtJoint.mjJNT_FREE.value, mujoco.mjtJoint.mjJNT_SLIDE.value)
    travelling = {int(body) for body in model.jnt_bodyid[np.isin(model.jnt_type, travelling_types)]}

    # The trunk is the root of the first actuated body that travels.
    trunk = -1
    for root in model.body_rootid[actuated_bodies]:
        if int(root) in travelling:
            trunk = int(root)
            break
    distance = max(DISTANCE_PER_RADIUS * radius, DISTANCE_PER_HALF_HEIGHT * half_height)
    return Subject(trunk, (low + high) / 2, radius, distance)
