"""The look of every picture: one sky, floor and light for any family's model; and the headless
OpenGL to draw it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metarobot.render.opengl import _gl
from metarobot.types import Floats

Pixels = NDArray[np.uint8]
OVERSAMPLE = 2
"""Pixels are drawn this many times finer each way, then averaged: cheaper in software than OpenGL's
own smoothing."""
_ZENITH, _HORIZON, _HILLS = (86, 142, 196), (226, 235, 241), ((188, 205, 219), (160, 184, 204))
_FLOOR, _LINES = ((112, 131, 146), (128, 147, 161)), (168, 184, 195)
_BODY = (0.93, 0.93, 0.95, 1.0)
_LIMBS = (
    (0.96, 0.45, 0.14, 1.0),
    (0.13, 0.55, 0.60, 1.0),
    (0.95, 0.72, 0.18, 1.0),
    (0.48, 0.42, 0.70, 1.0),
)
_KEY = np.array([0, 0, 0], np.uint8)
_LIGHT, _SHADOW = np.array([0.3, 0.35, -1.0]), np.array([0.10, 0.14, 0.18, 0.3], np.float32)
_TILE_SIZE, _TILE_M = 512, 2.0
_TILT, _ASIDE, _WIDE, _TALL = 0.19, 0.12, 2.5, 3.6
"""The camera looks down and ahead by these angles (rad), so many times the subject's radius or half
height away."""


def up(model: mujoco.MjModel) -> Floats:
    """Return the direction against gravity in the model's axes: not z where a slope is gravity
    turned.
    """
    norm = float(np.linalg.norm(model.opt.gravity))
    return -model.opt.gravity / norm if norm > 0 else np.array([0.0, 0.0, 1.0])


def apply_visual_style(spec: mujoco.MjSpec) -> mujoco.MjSpec:
    """Give a family's model the studio's sky, floor, lights and colours; its physics stays as it
    was.
    """
    for thing in (
        *spec.lights,
        *(t for t in spec.textures if t.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX),
    ):
        spec.delete(thing)
    _dress_floor(spec)
    _dress_robot(spec)
    spec.worldbody.add_light(
        name="studio_key",
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        dir=_LIGHT,
        diffuse=[0.62, 0.60, 0.56],
        specular=[0.3, 0.3, 0.3],
        castshadow=True,
    )
    light = spec.visual.headlight
    light.ambient, light.diffuse, light.specular = (
        [0.42, 0.43, 0.46],
        [0.22, 0.22, 0.22],
        [0.05, 0.05, 0.05],
    )
    return spec


def _dress_floor(spec: mujoco.MjSpec) -> None:
    texture = spec.add_texture(name="studio_floor", type=mujoco.mjtTexture.mjTEXTURE_2D, nchannel=3)
    texture.width, texture.height, texture.data = _TILE_SIZE, _TILE_SIZE, _tile().tobytes()
    material = spec.add_material(
        name="studio_floor", texuniform=True, texrepeat=[1 / _TILE_M, 1 / _TILE_M]
    )
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "studio_floor"
    material.specular, material.shininess, material.reflectance = 0.1, 0.1, 0.0
    for geom in spec.worldbody.geoms:
        if geom.type in (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_HFIELD):
            geom.material, geom.rgba = "studio_floor", [1, 1, 1, 1]
        if geom.type == mujoco.mjtGeom.mjGEOM_PLANE:
            geom.size[:2] = 0


def _dress_robot(spec: mujoco.MjSpec) -> None:
    """Paint plain shapes that motors move: trunk light, each limb a colour; meshes and welded loads
    keep theirs.
    """
    driven = {a.target for a in spec.actuators}
    for trunk in (b for b in spec.worldbody.bodies if any(j.name in driven for j in _joints(b))):
        _paint(trunk, _BODY)
        for i, limb in enumerate(b for b in trunk.bodies if any(_joints(b))):
            _paint_all(limb, _LIMBS[i % len(_LIMBS)])


def _joints(body: Any) -> Iterator[Any]:
    yield from body.joints
    for child in body.bodies:
        yield from _joints(child)


def _paint_all(body: Any, rgba: tuple[float, ...], depth: int = 0) -> None:
    lighter = 0.16 * min(depth, 3)
    _paint(body, tuple(c + (1 - c) * lighter for c in rgba))
    for child in body.bodies:
        _paint_all(child, rgba, depth + 1)


def _paint(body: Any, rgba: tuple[float, ...]) -> None:
    for geom in body.geoms:
        if geom.type != mujoco.mjtGeom.mjGEOM_MESH:
            geom.material, geom.rgba = "", rgba


def _tile() -> Pixels:
    """Draw two by two squares of a metre, a fine line every half metre."""
    metre, half = _TILE_SIZE // 2, _TILE_SIZE // 4
    i, j = np.indices((_TILE_SIZE, _TILE_SIZE))
    tile = np.array(_FLOOR, float)[(i // metre + j // metre) % 2]
    line = np.minimum((i + 2) % metre, (j + 2) % metre) < 4
    fine = np.minimum((i + 1) % half, (j + 1) % half) < 2
    tile = np.where(fine[..., None], 0.75 * tile + 0.25 * np.array(_LINES), tile)
    return np.where(line[..., None], _LINES, tile).astype(np.uint8)


def paint_sky(rays: Floats, up: Floats) -> Pixels:
    """Draw what is far out along ``rays`` ``(H, W, 3)``, level in the world outside: haze, two rows
    of hills, blue.
    """
    height, round_ = rays @ up, np.arctan2(rays[..., 0], rays[..., 1])
    blend = np.clip(height / 0.45, 0, 1)[..., None] ** 0.7
    sky = (1 - blend) * np.array(_HORIZON) + blend * np.array(_ZENITH)
    for k, (base, colour) in enumerate(zip((0.075, 0.035), _HILLS, strict=True)):
        waves = (
            0.016 * np.sin(5 * round_ + 2 * k)
            + 0.009 * np.sin(13 * round_ + k)
            + 0.004 * np.sin(31 * round_)
        )
        haze = np.clip(height / (base + waves), 0, 1)[..., None] ** 0.8
        shade = (1 - haze) * np.array(_HORIZON) + haze * np.array(colour)
        sky = np.where((height < base + waves)[..., None], shade, sky)
    return np.asarray(sky.round(), dtype=np.uint8)


class Scene:
    """One task's visual model on an OpenGL context that all stages share; ``draw`` takes a picture
    of a state.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        width: int,
        height: int,
        view: tuple[tuple[float, float, float], float] | None = None,
    ) -> None:
        self.model, self.data = model, mujoco.MjData(model)
        self._rect = mujoco.MjrRect(0, 0, OVERSAMPLE * width, OVERSAMPLE * height)
        self._up = up(model)
        self.followed, self.centre, self.radius, self._distance = _subject(model, self.data)
        if view is not None:
            self.followed, self.centre, self.radius = -1, np.array(view[0]), view[1]
            self._distance = _WIDE * self.radius
        self._floor = next(
            (g for g in range(model.ngeom) if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_PLANE), -1
        )
        self._settle(model)
        _gl().make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_FOG] = True
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self._floor < 0
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._option, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        side = np.array([_ASIDE, 1.0, 0.0])
        side = side - (side @ self._up) * self._up
        side /= np.linalg.norm(side)
        self._forward = np.cos(_TILT) * side - np.sin(_TILT) * self._up
        self._head = np.cos(_TILT) * self._up + np.sin(_TILT) * side
        self._sky = paint_sky(self._far(self._rays()), self._up)

    def _settle(self, model: mujoco.MjModel) -> None:
        vis = model.vis
        vis.global_.offwidth, vis.global_.offheight = self._rect.width, self._rect.height
        vis.quality.offsamples, vis.quality.shadowsize = 0, 1024
        model.stat.extent = self.radius
        vis.map.znear, vis.map.zfar, vis.map.shadowclip = 0.05, 80.0, 2.0
        vis.map.fogstart, vis.map.fogend = 5.0, 30.0
        vis.rgba.fog[:] = (*(c / 255 for c in _HORIZON), 1)

    def _rays(self) -> Floats:
        height, width = self._rect.height, self._rect.width
        scale = np.tan(np.radians(self.model.vis.global_.fovy) / 2) / (height / 2)
        x, y = (
            (np.arange(width) + 0.5 - width / 2) * scale,
            (height / 2 - np.arange(height) - 0.5) * scale,
        )
        right = np.cross(self._forward, self._head)
        rays = self._forward + x[None, :, None] * right + y[:, None, None] * self._head
        return np.asarray(rays / np.linalg.norm(rays, axis=-1, keepdims=True))

    def _far(self, rays: Floats) -> Floats:
        """Leave out the lower rows of a picture that show nothing but near floor."""
        if self._floor < 0:
            return rays
        above = rays @ self.data.geom_xmat[self._floor].reshape(3, 3)[:, 2] > -0.1
        return rays[: len(above) - int(np.argmax(above.any(1)[::-1]))]

    def look(self) -> Floats:
        """Return where the subject's centre of mass is now; the middle of the scene if nothing in
        it travels.
        """
        return (
            self.centre.copy() if self.followed < 0 else self.data.subtree_com[self.followed].copy()
        )

    def load(self, state: Floats) -> None:
        """Put the stage into a full integration state, kinematics computed."""
        mujoco.mj_setState(self.model, self.data, state, mujoco.mjtState.mjSTATE_INTEGRATION.value)
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def draw(self, look: Floats) -> Pixels:
        """Take a picture from the side, upright in the world outside, of the place ``look``; ``(H,
        W, 3)``.
        """
        _gl().make_current()
        self._aim(look)
        fine = np.empty((self._rect.height, self._rect.width, 3), np.uint8)
        # Several stages share the OpenGL context: what was drawn last may have been another's.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(fine, None, self._rect, self._context)
        fine = fine[::-1]
        far = fine[: len(self._sky)]
        np.copyto(far, self._sky, where=(far == _KEY).all(-1, keepdims=True))
        return np.asarray(Image.fromarray(fine).reduce(OVERSAMPLE))

    def _aim(self, look: Floats) -> None:
        camera, tilt = self._camera, np.degrees(_TILT)
        camera.lookat, camera.distance, camera.azimuth, camera.elevation = (
            look,
            self._distance,
            90.0,
            -tilt,
        )
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        self._place_eyes(look)  # an endless floor is laid around where the scene was last seen from
        mujoco.mjv_updateScene(
            self.model, self.data, self._option, None, camera, everything, self._scene
        )
        self._place_eyes(look)
        for light in self._scene.lights[1 : self._scene.nlight]:
            light.pos[:] = look - 3.0 * self.radius * np.array(light.dir)
        if self._floor >= 0:
            self._cast_shadows()

    def _place_eyes(self, look: Floats) -> None:
        for eye in self._scene.camera:
            eye.pos[:], eye.forward[:], eye.up[:] = (
                look - self._distance * self._forward,
                self._forward,
                self._head,
            )

    def _cast_shadows(self) -> None:
        """Add each shape once more, flattened along the light onto the floor: a tenth of the time
        of shadow maps.
        """
        normal = self.data.geom_xmat[self._floor].reshape(3, 3)[:, 2]
        origin = self.data.geom_xpos[self._floor] + 0.004 * normal
        flat = np.eye(3) - 0.99 * np.outer(_LIGHT, normal) / (normal @ _LIGHT)
        scene = self._scene
        for i in range(scene.ngeom):
            geom = scene.geoms[i]
            if scene.ngeom < scene.maxgeom and self._casts(geom):
                shadow = scene.geoms[scene.ngeom]
                pos = origin + flat @ (np.array(geom.pos) - origin)
                mujoco.mjv_initGeom(
                    shadow, geom.type, np.ones(3), pos, (flat @ geom.mat).ravel(), _SHADOW
                )
                shadow.size[:] = geom.size
                shadow.dataid, shadow.category = geom.dataid, mujoco.mjtCatBit.mjCAT_DECOR.value
                scene.ngeom += 1

    def _casts(self, geom: mujoco.MjvGeom) -> bool:
        return bool(
            geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and self.model.geom_bodyid[geom.objid] > 0
        )

    def close(self) -> None:
        """Free what the stage holds on the graphics side."""
        _gl().make_current()
        self._context.free()


def _subject(model: mujoco.MjModel, data: mujoco.MjData) -> tuple[int, Floats, float, float]:
    """Find the trunk to follow (−1: none travels), the middle of all but floor, its radius, and how
    far to stand.
    """
    mujoco.mj_forward(model, data)
    shown = [g for g in range(model.ngeom) if model.geom_bodyid[g] > 0] or list(range(model.ngeom))
    low = (data.geom_xpos[shown] - model.geom_rbound[shown, None]).min(0)
    high = (data.geom_xpos[shown] + model.geom_rbound[shown, None]).max(0)
    radius, tall = float(np.linalg.norm(high - low) / 2), float(high[2] - low[2]) / 2
    joints = (mujoco.mjtTrn.mjTRN_JOINT.value, mujoco.mjtTrn.mjTRN_JOINTINPARENT.value)
    driven = model.jnt_bodyid[model.actuator_trnid[np.isin(model.actuator_trntype, joints), 0]]
    travels = (mujoco.mjtJoint.mjJNT_FREE.value, mujoco.mjtJoint.mjJNT_SLIDE.value)
    free = {int(b) for b, t in zip(model.jnt_bodyid, model.jnt_type, strict=True) if t in travels}
    followed = next((int(r) for r in model.body_rootid[driven] if int(r) in free), -1)
    return followed, (low + high) / 2, radius, max(_WIDE * radius, _TALL * tall)
