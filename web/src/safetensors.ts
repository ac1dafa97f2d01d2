/**
 * Scenes as they come from the package, a safetensors file each (see explainer/scene_file.py):
 *
 *     8 bytes   length of the header, little-endian
 *     header    JSON: {"__metadata__": {"scene": ...}, NAME: {"dtype", "shape", "data_offsets": [from, to]}, ...}
 *     tensors   row by row, little-endian; the library puts wider numbers first, so that each starts where it can be viewed
 *
 * The scene is JSON too; {"tensor": NAME} in it stands for a tensor.
 */

export interface Tensor {
  shape: number[];
  data: Float32Array | Float64Array;
}

const TYPES = { F32: Float32Array, F64: Float64Array };

interface Entry {
  dtype: keyof typeof TYPES;
  shape: number[];
  data_offsets: [number, number];
}

/** Throws an Error if the bytes are no such file. */
export function fromSafetensors<T>(buffer: ArrayBuffer): T {
  const length = buffer.byteLength < 8 ? Infinity : Number(new DataView(buffer).getBigUint64(0, true));
  if (8 + length > buffer.byteLength) throw new Error("The file ends within its header; reload this page.");
  const { __metadata__: metadata, ...entries } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const tensors = new Map(Object.entries(entries as Record<string, Entry>).map(([name, entry]) => [name, view(name, entry, buffer, 8 + length)]));
  const lift = (node: unknown): unknown => {
    if (Array.isArray(node)) return node.map(lift);
    if (node === null || typeof node !== "object") return node;
    const inside = Object.entries(node);
    if (inside.length === 1 && inside[0][0] === "tensor") return tensors.get(inside[0][1]);
    return Object.fromEntries(inside.map(([key, value]) => [key, lift(value)]));
  };
  return lift(JSON.parse(metadata.scene)) as T;
}

function view(name: string, { dtype, shape, data_offsets: [from, to] }: Entry, buffer: ArrayBuffer, start: number): Tensor {
  const numbers = TYPES[dtype];
  const count = shape.reduce((a, b) => a * b, 1);
  if (!numbers || to - from !== count * numbers.BYTES_PER_ELEMENT || start + to > buffer.byteLength) {
    throw new Error(`The tensor ${name} is not what the file's header says; reload this page.`);
  }
  return { shape, data: new numbers(buffer, start + from, count) };
}
