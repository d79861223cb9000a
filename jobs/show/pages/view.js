// The pictures on the screen and a little around them: as tiles in a row after row, or as a grid of two axes.
"use strict";

{
  const { el, untrusted } = latentmill;
  const GAP = 12;
  const AROUND = 400; // pixels above and below the screen that are drawn as well

  // Tiles side by side, as wide as fits.
  class Tiles {
    constructor(rows, { width, size, captionHeight }) {
      this.cells = rows.map((row) => [row]);
      this.across = Math.max(1, Math.floor((width - GAP) / (size + GAP)));
      this.tile = (width - GAP) / this.across - GAP;
      this.step = this.tile + captionHeight + GAP;
      this.width = width;
      this.height = Math.ceil(rows.length / this.across) * this.step + GAP;
    }

    place(index) {
      return [GAP + (index % this.across) * (this.tile + GAP), GAP + Math.floor(index / this.across) * this.step];
    }

    visible({ top, bottom }) {
      const first = Math.max(0, Math.floor((top - GAP) / this.step)) * this.across;
      const last = Math.min(this.cells.length, (Math.floor((bottom - GAP) / this.step) + 1) * this.across);
      return Array.from({ length: Math.max(0, last - first) }, (_, offset) => first + offset);
    }
  }

  const headsOf = (width) => ({ top: 34, left: width < 600 ? 88 : 140 });

  // A cell for each pair of values, which may hold several rows or none.
  class Matrix {
    constructor(rows, { xs, ys, xOf, yOf, width, size, captionHeight }) {
      this.xs = xs;
      this.ys = ys;
      this.heads = headsOf(width);
      this.across = xs.length;
      const places = [new Map(xs.map((x, place) => [x, place])), new Map(ys.map((y, place) => [y, place]))];
      this.cells = Array.from({ length: xs.length * ys.length }, () => []);
      for (const row of rows) {
        const [x, y] = [places[0].get(xOf(row)), places[1].get(yOf(row))];
        if (x !== undefined && y !== undefined) this.cells[y * this.across + x].push(row);
      }
      this.tile = size;
      this.column = size + GAP;
      this.step = size + captionHeight + GAP;
      this.width = this.heads.left + xs.length * this.column + GAP;
      this.height = this.heads.top + ys.length * this.step + GAP;
    }

    place(index) {
      const { left, top } = this.heads;
      return [left + GAP + (index % this.across) * this.column, top + Math.floor(index / this.across) * this.step];
    }

    visible({ top, bottom, left, right }) {
      const range = (from, to, length) => {
        const first = Math.max(0, Math.floor(from));
        return Array.from({ length: Math.max(0, Math.min(length, Math.floor(to) + 1) - first) }, (_, n) => first + n);
      };
      const down = range((top - this.heads.top) / this.step, (bottom - this.heads.top) / this.step, this.ys.length);
      const along = range((left - this.heads.left) / this.column, (right - this.heads.left) / this.column, this.across);
      return down.flatMap((y) => along.map((x) => y * this.across + x));
    }
  }

  latentmill.View = class {
    // `describe(row)` gives what a tile says: thumb, status, picture, title, caption, label.
    constructor(scroller, { describe, open }) {
      this.scroller = scroller;
      this.canvas = el("div.canvas", { role: "group", aria: { label: "Pictures" } });
      this.scroller.append(this.canvas);
      this.describe = describe;
      this.open = open;
      this.tiles = new Map();
      this.current = 0;
      let asked = false;
      const ask = () => {
        if (!asked) requestAnimationFrame(() => ((asked = false), this.#draw()));
        asked = true;
      };
      scroller.addEventListener("scroll", ask, { passive: true });
      this.canvas.addEventListener("keydown", (event) => this.#key(event));
    }

    // `settings` are those of the layout; the place where one was is kept if `keep`.
    show(rows, settings, { keep = false } = {}) {
      const captionHeight = settings.kind === "matrix" ? 24 : 62;
      const options = { ...settings, width: this.scroller.clientWidth, captionHeight };
      this.layout = settings.kind === "matrix" ? new Matrix(rows, options) : new Tiles(rows, options);
      this.settings = settings;
      for (const tile of this.tiles.values()) tile.remove();
      this.tiles.clear();
      this.canvas.replaceChildren();
      this.canvas.style.width = `${this.layout.width}px`;
      this.canvas.style.height = `${this.layout.height}px`;
      this.canvas.style.setProperty("--tile", `${this.layout.tile}px`);
      this.canvas.classList.toggle("matrix", settings.kind === "matrix");
      if (settings.kind === "matrix") this.#addHeads(settings);
      this.current = keep ? Math.min(this.current, Math.max(0, this.layout.cells.length - 1)) : 0;
      if (!keep) this.scroller.scrollTo(0, 0);
      this.#draw();
    }

    // The size at which so many columns of a grid fit.
    sizeFor(columns) {
      const { left } = headsOf(this.scroller.clientWidth);
      return Math.floor((this.scroller.clientWidth - left - GAP) / columns) - GAP;
    }

    // Scrolls to the cell of a row and focuses it.
    focusRow(row) {
      const index = this.layout.cells.findIndex((rows) => rows.includes(row));
      if (index >= 0) this.#focus(index);
    }

    #addHeads({ xs, ys, xLabel, yLabel, xName, yName }) {
      const { heads, column, step, tile } = this.layout;
      this.columnHeads = el("div.heads.top", { aria: { hidden: "true" } }, el("span.cover", { vars: { left: `${heads.left}px` } }));
      this.rowHeads = el("div.heads.left", { aria: { hidden: "true" }, vars: { left: `${heads.left}px`, height: `${this.layout.height - heads.top}px` } });
      this.canvas.append(this.columnHeads, this.rowHeads);
      this.headLabels = { xs: xs.map(xLabel), ys: ys.map(yLabel), xName, yName };
      this.headSizes = { column, step, tile };
      this.shownHeads = new Map();
    }

    #drawHeads(indexes) {
      const { across, heads } = this.layout;
      const { column, step, tile } = this.headSizes;
      const wanted = new Set();
      for (const index of indexes) wanted.add(`x${index % across}`).add(`y${Math.floor(index / across)}`);
      for (const [key, head] of this.shownHeads) {
        if (wanted.has(key)) continue;
        head.remove();
        this.shownHeads.delete(key);
      }
      for (const key of wanted) {
        if (this.shownHeads.has(key)) continue;
        const place = Number(key.slice(1));
        const isColumn = key[0] === "x";
        const text = isColumn ? this.headLabels.xs[place] : this.headLabels.ys[place];
        const name = isColumn ? this.headLabels.xName : this.headLabels.yName;
        const head = el("span.head", { title: `${name} ${text}` }, el("span.name", {}, `${name} `), untrusted(text));
        if (isColumn) Object.assign(head.style, { left: `${heads.left + GAP + place * column}px`, width: `${tile}px` });
        else Object.assign(head.style, { top: `${place * step}px`, height: `${tile}px`, width: `${heads.left}px` });
        (isColumn ? this.columnHeads : this.rowHeads).append(head);
        this.shownHeads.set(key, head);
      }
    }

    #draw() {
      if (!this.layout) return;
      const { scrollTop, scrollLeft, clientHeight, clientWidth } = this.scroller;
      const indexes = this.layout.visible({
        top: scrollTop - AROUND,
        bottom: scrollTop + clientHeight + AROUND,
        left: scrollLeft - AROUND,
        right: scrollLeft + clientWidth + AROUND,
      });
      const wanted = new Set(indexes);
      const focused = this.tiles.get(this.current)?.contains(document.activeElement);
      if (focused || !wanted.size) wanted.add(this.current);
      for (const [index, tile] of this.tiles) {
        if (wanted.has(index)) continue;
        tile.remove();
        this.tiles.delete(index);
      }
      const added = document.createDocumentFragment();
      for (const index of wanted) {
        if (this.tiles.has(index) || index >= this.layout.cells.length) continue;
        const tile = this.#tile(index);
        this.tiles.set(index, tile);
        added.append(tile);
      }
      this.canvas.append(added);
      if (this.layout instanceof Matrix) this.#drawHeads(indexes);
      // one tile can be reached by Tab: where one was, or the first on the screen
      const reachable = this.tiles.has(this.current) ? this.current : indexes[0];
      for (const [index, tile] of this.tiles) tile.tabIndex = index === reachable ? 0 : -1;
    }

    #tile(index) {
      const rows = this.layout.cells[index];
      const [x, y] = this.layout.place(index);
      const place = { left: `${x}px`, top: `${y}px` };
      if (!rows.length) {
        const tile = el("div.tile.empty", {}, el("span.frame", {}, "–"));
        Object.assign(tile.style, place);
        return tile;
      }
      const seen = this.describe(rows[0]);
      const frame = seen.thumb
        ? el("span.frame", {}, el("img", { src: seen.thumb, alt: "", decoding: "async", draggable: false }))
        : el("span.frame.words", { data: { status: seen.picture } }, el("strong", {}, seen.picture), el("span", {}, untrusted(seen.why)));
      frame.querySelector("img")?.addEventListener("error", () => {
        frame.replaceChildren(el("strong", {}, "no thumbnail"));
        frame.classList.add("words");
      });
      if (rows.length > 1) frame.append(el("span.more", { title: `${rows.length} pictures` }, `+${rows.length - 1}`));
      const matrix = this.settings.kind === "matrix";
      const tile = el(
        "button.tile",
        { type: "button", data: { index, row: rows[0] }, aria: { label: seen.label }, onclick: () => this.#opened(index) },
        frame,
        matrix ? null : el("span.title", {}, untrusted(seen.title)),
        el("span.caption", {}, matrix ? seen.short : seen.caption),
      );
      Object.assign(tile.style, place);
      tile.addEventListener("focus", () => this.#reached(index));
      return tile;
    }

    #opened(index) {
      this.current = index;
      this.open(this.layout.cells.flat(), this.layout.cells[index][0]);
    }

    #reached(index) {
      const before = this.tiles.get(this.current);
      if (before) before.tabIndex = -1;
      this.current = index;
      this.tiles.get(index).tabIndex = 0;
    }

    #key(event) {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const { across, cells } = this.layout;
      const page = Math.max(1, Math.floor(this.scroller.clientHeight / this.layout.step)) * across;
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across, PageUp: -page, PageDown: page };
      const targets = { Home: 0, End: cells.length - 1 };
      let next = targets[event.key] ?? (event.key in steps ? this.current + steps[event.key] : null);
      if (next === null) return;
      event.preventDefault();
      const direction = next < this.current ? -1 : 1;
      next = Math.min(cells.length - 1, Math.max(0, next));
      while (next >= 0 && next < cells.length && !cells[next].length) next += direction; // a cell without a row
      if (next >= 0 && next < cells.length) this.#focus(next);
    }

    #focus(index) {
      this.current = index;
      const [x, y] = this.layout.place(index);
      const { heads = { top: 0, left: 0 }, tile, step } = this.layout;
      const { scroller } = this;
      const top = Math.min(scroller.scrollTop, y - heads.top - GAP);
      const left = Math.min(scroller.scrollLeft, x - heads.left - GAP);
      scroller.scrollTo(
        x + tile > scroller.scrollLeft + scroller.clientWidth ? x + tile + GAP - scroller.clientWidth : left,
        y + step > scroller.scrollTop + scroller.clientHeight ? y + step - scroller.clientHeight : top,
      );
      this.#draw();
      this.tiles.get(index)?.focus({ preventScroll: true });
    }
  };
}
