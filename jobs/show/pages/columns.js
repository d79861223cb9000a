// Rows as columns: numbers as they are, all else as codes of its different texts; and which rows are wanted, in what order.
"use strict";

latentmill.Column = class {
  constructor(name, pieces, length) {
    this.name = name;
    this.kind = pieces.every((piece) => piece.column.kind === "number") ? "number" : "text";
    this.length = length;
    if (this.kind === "number") this.#takeNumbers(pieces);
    else this.#takeTexts(pieces);
  }

  #takeNumbers(pieces) {
    this.numbers = new Float64Array(this.length);
    for (const { column, from, n } of pieces) {
      const { numbers } = column;
      for (let row = 0; row < n; row++) {
        const value = Array.isArray(numbers) ? numbers[row] : numbers;
        this.numbers[from + row] = value === null ? NaN : value;
      }
    }
  }

  #takeTexts(pieces) {
    this.texts = [];
    this.codes = new Int32Array(this.length);
    const known = new Map();
    const codeOf = (text) => {
      if (!known.has(text)) known.set(text, this.texts.push(text) - 1);
      return known.get(text);
    };
    for (const { column, from, n } of pieces) {
      if (column.kind === "number") {
        for (let row = 0; row < n; row++) {
          const value = Array.isArray(column.numbers) ? column.numbers[row] : column.numbers;
          this.codes[from + row] = value === null ? -1 : codeOf(String(value));
        }
        continue;
      }
      const codes = column.texts.map(codeOf);
      for (let row = 0; row < n; row++) {
        const code = Array.isArray(column.codes) ? column.codes[row] : column.codes;
        this.codes[from + row] = code < 0 ? -1 : codes[code];
      }
    }
  }

  // A number, a text, or null.
  value(row) {
    if (this.kind === "text") return this.codes[row] < 0 ? null : this.texts[this.codes[row]];
    return Number.isNaN(this.numbers[row]) ? null : this.numbers[row];
  }

  // The same as a person reads it.
  label(row) {
    const value = this.value(row);
    return value === null ? "" : typeof value === "number" ? latentmill.number(value) : value;
  }

  // Each different value with the number of rows that have it, null among them; undefined if there are more than `most`.
  counts(rows, most = Infinity) {
    const found = new Map();
    for (const row of rows) {
      const value = this.value(row);
      found.set(value, (found.get(value) ?? 0) + 1);
      if (found.size > most) return undefined;
    }
    return found;
  }

  // Whether rows differ in it.
  get varies() {
    this.differs ??= this.kind === "number"
      ? this.numbers.some((value) => !Object.is(value, this.numbers[0]))
      : this.codes.some((code) => code !== this.codes[0]);
    return this.differs;
  }

  // For each row its place in this column's order; rows without a value come last, whatever the direction.
  get ranks() {
    if (this.kind === "number") return this.numbers;
    if (!this.ranked) {
      const order = this.texts.map((_, code) => code);
      order.sort((a, b) => latentmill.compare(this.texts[a], this.texts[b]));
      const rankOf = new Float64Array(this.texts.length);
      order.forEach((code, rank) => (rankOf[code] = rank));
      this.ranked = Float64Array.from(this.codes, (code) => (code < 0 ? NaN : rankOf[code]));
    }
    return this.ranked;
  }
};

latentmill.compare = (() => {
  const collator = new Intl.Collator(undefined, { numeric: true });
  return (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b)));
})();

// All rows of the page. `blocks` are values of files of data, in order; each has `numbers`, `pictures` and `columns`.
latentmill.Rows = class {
  constructor(blocks) {
    this.length = blocks.reduce((sum, block) => sum + block.numbers.length, 0);
    this.pictures = blocks.flatMap((block) => block.pictures);
    const pieces = new Map([["sample", []]]);
    let from = 0;
    for (const block of blocks) {
      const n = block.numbers.length;
      pieces.get("sample").push({ column: { kind: "number", numbers: block.numbers }, from, n });
      for (const column of block.columns) {
        if (!pieces.has(column.name)) pieces.set(column.name, []);
        pieces.get(column.name).push({ column, from, n });
      }
      from += n;
    }
    this.columns = new Map();
    for (const [name, parts] of pieces) this.columns.set(name, new latentmill.Column(name, parts, this.length));
  }

  column(name) {
    return this.columns.get(name);
  }

  get sample() {
    return this.columns.get("sample").numbers;
  }

  // The rows that all filters and the search let through, but for the filter of `except`.
  select({ filters, search = "", except = null }) {
    const tests = [];
    for (const [name, filter] of filters) {
      const column = this.column(name);
      if (name !== except && column) tests.push(testOf(column, filter));
    }
    for (const term of search.toLowerCase().split(/\s+/).filter(Boolean)) tests.push(this.#termTest(term));
    const found = [];
    for (let row = 0; row < this.length; row++) if (tests.every((test) => test(row))) found.push(row);
    return found;
  }

  // A word is looked for in all texts that differ between rows, and as the number of a sample.
  #termTest(term) {
    const texts = [...this.columns.values()].filter((column) => column.kind === "text" && (column.varies || column.name === "prompt"));
    const hits = texts.map((column) => {
      column.lower ??= column.texts.map((text) => text.toLowerCase());
      return { codes: column.codes, hit: Uint8Array.from(column.lower, (text) => (text.includes(term) ? 1 : 0)) };
    });
    const sample = /^#?\d+$/.test(term) ? Number(term.replace("#", "")) : -1;
    const samples = this.sample;
    return (row) => samples[row] === sample || hits.some(({ codes, hit }) => codes[row] >= 0 && hit[codes[row]] === 1);
  }

  sort(rows, name, descending) {
    const column = this.column(name) ?? this.column("sample");
    const { ranks } = column;
    const sign = descending ? -1 : 1;
    return rows.sort((a, b) => {
      const [x, y] = [ranks[a], ranks[b]];
      if (x === y || (x !== x && y !== y)) return a - b;
      if (x !== x) return 1;
      return y !== y ? -1 : sign * (x - y);
    });
  }
};

// A filter is { least, most } of numbers, { any: Set of values }, or { contains: text }.
function testOf(column, filter) {
  if (filter.any) {
    if (column.kind === "number") return (row) => filter.any.has(column.value(row));
    const allowed = Uint8Array.from(column.texts, (text) => (filter.any.has(text) ? 1 : 0));
    const none = filter.any.has(null);
    return (row) => (column.codes[row] < 0 ? none : allowed[column.codes[row]] === 1);
  }
  if (filter.contains !== undefined) {
    const wanted = filter.contains.toLowerCase();
    if (column.kind === "number") return (row) => column.label(row).includes(wanted);
    const allowed = Uint8Array.from(column.texts, (text) => (text.toLowerCase().includes(wanted) ? 1 : 0));
    return (row) => column.codes[row] >= 0 && allowed[column.codes[row]] === 1;
  }
  const { least = -Infinity, most = Infinity } = filter;
  const numbers = column.kind === "number" ? column.numbers : Float64Array.from(column.codes, () => NaN);
  return (row) => numbers[row] >= least && numbers[row] <= most;
}
