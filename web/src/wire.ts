/** Scenes as they come from the package: a JSON header that names arrays, then the arrays' bytes. See explainer/wire.py. */

export interface Tensor {
  shape: number[];
  data: Float32Array | Float64Array;
}

export function unpack<T>(buffer: ArrayBuffer): T {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays: Tensor[] = header.arrays.map(({ dtype, shape, offset }: { dtype: string; shape: number[]; offset: number }) => {
    const count = shape.reduce((a, b) => a * b, 1);
    const at = 4 + length + offset;
    return { shape, data: dtype === "f4" ? new Float32Array(buffer, at, count) : new Float64Array(buffer, at, count) };
  });
  const lift = (node: unknown): unknown => {
    if (Array.isArray(node)) return node.map(lift);
    if (node === null || typeof node !== "object") return node;
    const entries = Object.entries(node);
    if (entries.length === 1 && entries[0][0] === "array") return arrays[entries[0][1] as number];
    return Object.fromEntries(entries.map(([key, value]) => [key, lift(value)]));
  };
  return lift(header.scene) as T;
}
