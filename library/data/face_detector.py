"""Find faces with OpenCV's own detector, FaceDetectorYN, and its small network YuNet (Wu et al. 2023)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from library.data.face_crops import Face, angle_of
from library.data.image_io import opencv, resize
from library.errors import UserError

#: what the Hub has of it: OpenCV's repository and the file
REPOSITORY, FILE = "opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx"

#: faces are looked for in images of at most this many pixels a side; larger ones are made smaller
_LONGEST = 1280


class FaceDetector:
    """OpenCV's detector.

    Args:
        model: the network's .onnx file.
        score: least score of a face, 0 to 1.

    Raises:
        UserError: the file is not such a network.
    """

    def __init__(self, model: Path, *, score: float) -> None:
        cv2 = opencv()
        try:
            self._detector = cv2.FaceDetectorYN.create(str(model), "", (320, 320), score_threshold=score)
            self._detector.detect(np.zeros((320, 320, 3), np.uint8))
        except cv2.error as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"--face_model {model}: not a network of OpenCV's FaceDetectorYN ({reason})") from None

    def __call__(self, pixels: np.ndarray) -> list[Face]:
        """Return the faces in uint8 (H, W, 3) RGB, the largest first."""
        height, width = pixels.shape[:2]
        scale = min(1.0, _LONGEST / max(width, height))
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        if scale < 1:
            pixels = resize(pixels, small, "area")
        self._detector.setInputSize(small)
        _, found = self._detector.detect(np.ascontiguousarray(pixels[..., ::-1]))
        rows = [] if found is None else found / scale  # x, y, w, h, then five (x, y): the right eye, the left eye, ...
        faces = [
            Face(x + w / 2, y + h / 2, w, h, angle_of((right_x, right_y), (left_x, left_y)))
            for x, y, w, h, right_x, right_y, left_x, left_y in (map(float, row[:8]) for row in rows)
        ]
        return sorted(faces, key=lambda face: -face.side)
