// The gallery: what is chosen (search, filters, order, view), kept in the address after `#`, and shown.
"use strict";

{
  const { Rows, View, Lightbox, announce, count, el, load, number, plural, themeButton, untrusted } = latentmill;
  const byId = (id) => document.getElementById(id);
  const SHORT = { guidance_scale: "guidance", num_inference_steps: "steps", negative_prompt: "without" };
  const PICTURES = ["no picture", "", "hidden", "unreadable"];
  const SHOWN = 1;
  const MOST_BOXES = 24; // values of a column that are listed; of more, ends or a text are asked for
  const MOST_NUMBERS = 12;
  const MOST_CELLS = 1000; // values of an axis
  const POLL_MS = 5000;
  const SMALLEST = 96; // pixels of a tile
  const LARGEST = 384;
  const WHY_MAX = 160;
  const TITLE_MAX = 240;

  class Gallery {
    constructor(meta) {
      this.meta = meta;
      this.blocks = new Map();
      this.facets = [];
      this.state = readState();
      this.view = new View(byId("scroller"), {
        describe: (row) => this.describe(row),
        open: (order, row) => this.lightbox.open(order, row),
      });
      this.lightbox = new Lightbox(byId("lightbox"), this);
      this.lightbox.onclose = (row) => this.view.focusRow(row);
    }

    // Reads the blocks that are new, and shows all.
    async read(meta, { keep = false } = {}) {
      const blocks = new Map();
      let done = 0;
      for (const { rows, n } of meta.blocks) {
        blocks.set(rows, this.blocks.get(rows) ?? (await load(rows)));
        done += n;
        if (!keep && meta.blocks.length > 1) byId("count").textContent = `reading ${count(done)} …`;
      }
      this.meta = meta;
      this.blocks = blocks;
      this.rows = new Rows([...blocks.values()]);
      this.starts = [];
      let from = 0;
      for (const block of meta.blocks) {
        this.starts.push(from);
        from += block.n;
      }
      this.detailsLoaded = false;
      document.title = `${meta.title} · latentmill`;
      byId("title").textContent = meta.title;
      this.#showState();
      this.#fillChoices();
      this.#buildFacets();
      this.update({ keep });
    }

    // Where the details of a row are: the file, and its place in there.
    detailsPlace(row) {
      let block = this.starts.length - 1;
      while (this.starts[block] > row) block--;
      const within = row - this.starts[block];
      const size = this.meta.detailRows;
      return { place: this.meta.blocks[block].details[Math.floor(within / size)], from: within % size };
    }

    // What a tile says of a row.
    describe(row) {
      const { rows, meta } = this;
      const sample = rows.sample[row];
      const status = rows.column("status").value(row) ?? "failed";
      const prompt = rows.column("prompt").label(row);
      const shown = rows.pictures[row] === SHOWN;
      const folder = String(Math.floor(sample / 1000)).padStart(5, "0");
      const score = rows.column("nsfw_score")?.value(row);
      const scored = score === null || score === undefined ? "" : `safety score ${number(score)}`;
      const { sort } = this.state;
      const caption = [`#${sample}`];
      if (sort !== "sample" && sort !== "prompt") caption.push(`${SHORT[sort] ?? sort} ${brief(rows.column(sort)?.value(row) ?? "–")}`);
      for (const { name } of meta.axes) {
        if (name === "prompt" || name === sort || !rows.column(name)) continue;
        caption.push(`${SHORT[name] ?? name} ${rows.column(name).label(row)}`);
      }
      if (!meta.axes.some((axis) => axis.name === "seed")) caption.push(`seed ${rows.column("seed")?.label(row)}`);
      return {
        status,
        picture: status === "ok" ? PICTURES[rows.pictures[row]] : status,
        thumb: shown ? `${meta.thumbs}/${folder}/${String(sample).padStart(meta.digits, "0")}.webp` : null,
        title: prompt.slice(0, TITLE_MAX),
        why: (rows.column("error")?.value(row) ?? scored).slice(0, WHY_MAX),
        caption: caption.join(" · "),
        short: caption[sort !== "sample" && sort !== "prompt" ? 1 : 0],
        label: `Sample ${sample}, ${status}: ${prompt.slice(0, TITLE_MAX)}`,
      };
    }

    // Everything that is shown follows from the state.
    update({ keep = false } = {}) {
      const { state, rows, meta } = this;
      this.chosen = rows.sort(rows.select(state), state.sort, state.descending);
      const settings = { kind: "tiles", size: state.size ?? (innerWidth < 600 ? 150 : 208) };
      const matrix = state.view === "matrix" ? this.#matrix() : null;
      const shown = matrix ? matrix.rows : this.chosen;
      if (matrix) Object.assign(settings, matrix, { kind: "matrix" });
      if (matrix && !state.size) settings.size = Math.min(settings.size, Math.max(SMALLEST, this.view.sizeFor(matrix.xs.length)));
      byId("size").value = settings.size;
      byId("axes").hidden = !matrix;
      byId("as-tiles").setAttribute("aria-pressed", String(!matrix));
      byId("as-matrix").setAttribute("aria-pressed", String(Boolean(matrix)));
      byId("direction").textContent = state.descending ? "↓" : "↑";
      byId("direction").setAttribute("aria-pressed", String(state.descending));
      const order = state.descending ? "Descending" : "Ascending";
      byId("direction").setAttribute("aria-label", order);
      byId("direction").title = order;
      const all = rows.length < meta.samples ? `${count(rows.length)} of ${plural(meta.samples, "sample")}` : plural(rows.length, "sample");
      byId("count").textContent = shown.length === rows.length ? all : `${count(shown.length)} of ${all}`;
      this.#showStatuses();
      this.#showChips();
      this.#showNothing(shown.length);
      for (const facet of this.facets) facet.update();
      this.view.show(shown, settings, { keep });
      writeState(state);
    }

    #showState() {
      const badge = byId("state");
      const { state, live, updated, limit, samples } = this.meta;
      badge.hidden = state === "published" && samples <= limit;
      badge.textContent = state !== "published" ? (live ? "running" : "not finished") : `the first ${count(limit)}`;
      badge.title = state !== "published" ? `as of ${new Date(updated).toLocaleString()}` : `of ${count(samples)}; latentmill report --max-pictures shows more`;
    }

    #showStatuses() {
      const { counts } = this.meta;
      const buttons = ["flagged", "failed"].filter((status) => counts[status]).map((status) => {
        const pressed = isOnly(this.state.filters.get("status"), status);
        const press = () => {
          if (pressed) this.state.filters.delete("status");
          else this.state.filters.set("status", { any: new Set([status]) });
          this.update();
        };
        return el("button.badge", { type: "button", data: { status }, aria: { pressed: String(pressed) }, onclick: press }, `${count(counts[status])} ${status}`);
      });
      byId("statuses").replaceChildren(...buttons);
    }

    #showChips() {
      const { filters, search } = this.state;
      const chips = [...filters].map(([name, filter]) => {
        const remove = () => {
          filters.delete(name);
          this.#buildFacets();
          this.update();
        };
        return el("button.chip", { type: "button", title: "Remove this filter", onclick: remove }, untrusted(`${name} ${spoken(filter)}`), el("span", { aria: { hidden: "true" } }, "✕"));
      });
      byId("chips").replaceChildren(...chips);
      byId("filter-button").textContent = filters.size ? `Filter · ${filters.size}` : "Filter";
      if (document.activeElement !== byId("search")) byId("search").value = search;
    }

    #showNothing(shown) {
      const place = byId("nothing");
      place.hidden = shown > 0;
      if (shown) return;
      if (this.rows.length === 0) {
        const first = this.meta.live ? "They appear here as soon as the first chunk is committed." : "Run the job, then write this report again.";
        place.replaceChildren(el("h2", {}, "No pictures yet"), el("p", {}, first));
        return;
      }
      const clear = () => {
        this.state.filters.clear();
        this.state.search = "";
        byId("search").value = "";
        this.#buildFacets();
        this.update();
      };
      place.replaceChildren(el("h2", {}, "Nothing matches"), el("p", {}, "No sample has all that is asked for."), el("button", { type: "button", onclick: clear }, "Clear search and filters"));
    }

    // The grid of axes: which rows are on this page of it, and the values along and down.
    #matrix() {
      const { state, rows } = this;
      const [x, y, z] = [state.x, state.y, state.z].map((name) => rows.column(name));
      if (!x && !y) return null;
      let shown = this.chosen;
      byId("pager").hidden = !z;
      if (z) {
        const pages = this.#valuesOf(z, shown);
        if (!pages.includes(state.page)) state.page = pages[0] ?? null;
        fill(byId("page"), pages.map((value, place) => [String(place), said(value)]), String(pages.indexOf(state.page)));
        byId("page").onchange = () => this.set({ page: pages[Number(byId("page").value)] });
        this.turn = (by) => {
          const place = pages.indexOf(state.page) + by;
          if (place >= 0 && place < pages.length) this.set({ page: pages[place] });
        };
        byId("page-before").disabled = pages.indexOf(state.page) <= 0;
        byId("page-after").disabled = pages.indexOf(state.page) >= pages.length - 1;
        shown = shown.filter((row) => z.value(row) === state.page);
      } else {
        this.turn = () => {};
      }
      const along = (column) => (column ? this.#valuesOf(column, shown) : [null]);
      const of = (column) => (row) => (column ? column.value(row) : null);
      const label = (column) => (value) => (column ? said(value) : "");
      const name = (column) => (!column || column.name === "prompt" ? "" : (SHORT[column.name] ?? column.name));
      const [xName, yName] = [name(x), name(y)];
      return { rows: shown, xs: along(x), ys: along(y), xOf: of(x), yOf: of(y), xLabel: label(x), yLabel: label(y), xName, yName };
    }

    // The different values among some rows: in the order of the axis; else numbers by size, texts as they came.
    #valuesOf(column, rows) {
      const there = [...column.counts(rows).keys()];
      const axis = this.meta.axes.find(({ name }) => name === column.name)?.values;
      const order = axis ?? (column.kind === "number" ? there.toSorted((a, b) => a - b) : column.texts);
      const places = new Map(order.map((value, place) => [value, place]));
      const place = (value) => (value === null ? Infinity : (places.get(value) ?? order.length));
      return there.sort((a, b) => place(a) - place(b) || 0);
    }

    set(changes, options) {
      Object.assign(this.state, changes);
      this.update(options);
    }

    // The selects: what can be sorted by, and what can be an axis.
    #fillChoices() {
      const { rows, meta, state } = this;
      const varying = [...rows.columns.values()].filter((column) => column.varies).map(({ name }) => name);
      const sortable = ["sample", ...varying.filter((name) => name !== "sample")];
      if (!sortable.includes(state.sort)) state.sort = "sample";
      fill(byId("sort"), sortable.map((name) => [name, name]), state.sort);
      const every = Array.from({ length: rows.length }, (_, row) => row);
      const axes = varying.filter((name) => name !== "sample" && rows.column(name).counts(every, MOST_CELLS));
      const planned = meta.axes.map(({ name }) => name).filter((name) => axes.includes(name));
      const candidates = [...planned, ...(axes.includes("prompt") && !planned.includes("prompt") ? ["prompt"] : [])];
      const proposed = planned.length > 1 ? [planned.at(-1), planned.at(-2), candidates.find((name) => !planned.slice(-2).includes(name))] : candidates;
      for (const [place, key] of ["x", "y", "z"].entries()) {
        if (state[key] === undefined) state[key] = proposed[place] ?? "";
        if (state[key] && !axes.includes(state[key])) state[key] = "";
        fill(byId(`axis-${key}`), [["", "–"], ...axes.map((name) => [name, name])], state[key]);
      }
      state.view ??= planned.length > 1 ? "matrix" : "tiles";
      byId("as-matrix").disabled = axes.length === 0;
    }

    // The panel of filters: a part for each column in which rows differ.
    #buildFacets() {
      const open = new Set(this.facets.filter(({ element }) => element.open).map(({ name }) => name));
      const columns = [...this.rows.columns.values()].filter((column) => column.varies);
      const axes = this.meta.axes.map(({ name }) => name);
      const rank = ({ name }) => (name === "status" ? -2 : axes.includes(name) ? -1 : 0);
      columns.sort((a, b) => rank(a) - rank(b));
      if (!this.facets.length) for (const name of ["status", ...axes]) open.add(name);
      for (const name of this.state.filters.keys()) open.add(name);
      this.facets = columns.map((column) => this.#facet(column, open.has(column.name)));
      const more = el("button", { type: "button", onclick: (event) => this.#loadDetails(event.currentTarget) }, "Filter by files and digests");
      byId("filters").replaceChildren(
        el("div.filters-head", {}, el("h2", {}, "Filters"), el("button.plain", { type: "button", aria: { label: "Close filters" }, onclick: () => showFilters(false) }, "✕")),
        ...this.facets.map(({ element }) => element),
        this.detailsLoaded || !this.rows.length ? "" : more,
      );
    }

    #facet(column, open) {
      const text = this.meta.columns.find(({ name }) => name === column.name)?.text ?? "";
      const body = el("div.facet");
      const element = el("details", { open, title: text }, el("summary", {}, column.name), body);
      const facet = { name: column.name, element, update: () => {} };
      const build = () => {
        if (!element.open || body.childElementCount) return;
        facet.update = this.#fillFacet(column, body);
        facet.update();
      };
      element.addEventListener("toggle", build);
      build();
      return facet;
    }

    // Fills the part of a column, and returns what brings it up to date.
    #fillFacet(column, body) {
      const { rows, state } = this;
      const every = Array.from({ length: rows.length }, (_, row) => row);
      const known = column.counts(every, column.kind === "number" ? MOST_NUMBERS : MOST_BOXES);
      const change = (filter) => {
        if (filter) state.filters.set(column.name, filter);
        else state.filters.delete(column.name);
        this.update();
      };
      if (known) return this.#boxes(column, body, known, change);
      return column.kind === "number" ? ends(column, body, state, change) : words(column, body, state, change);
    }

    #boxes(column, body, known, change) {
      const values = this.#valuesOf(column, Array.from({ length: this.rows.length }, (_, row) => row)).filter((value) => known.has(value));
      const boxes = values.map((value) => {
        const box = el("input", { type: "checkbox" });
        const amount = el("span.amount");
        box.addEventListener("change", () => {
          const any = new Set(values.filter((_, place) => boxes[place].box.checked));
          change(any.size ? { any } : null);
        });
        body.append(el("label", {}, box, el("span.value", { title: said(value) }, untrusted(said(value))), amount));
        return { value, box, amount };
      });
      return () => {
        const chosen = this.state.filters.get(column.name)?.any;
        const counts = column.counts(this.rows.select({ ...this.state, except: column.name }));
        for (const { value, box, amount } of boxes) {
          box.checked = chosen?.has(value) ?? false;
          amount.textContent = count(counts.get(value) ?? 0);
        }
      };
    }

    // All files of details, so that their columns can be filtered, searched and sorted by as well.
    async #loadDetails(button) {
      button.disabled = true;
      const pieces = new Map(this.meta.details.map((name) => [name, []]));
      let from = 0;
      for (const [place, block] of this.meta.blocks.entries()) {
        for (const [part, details] of block.details.entries()) {
          button.textContent = `reading ${count(from)} …`;
          const { columns } = await load(details);
          const start = this.starts[place] + part * this.meta.detailRows;
          const n = Math.min(this.meta.detailRows, block.n - part * this.meta.detailRows);
          for (const column of columns) pieces.get(column.name)?.push({ column, from: start, n });
          from = start + n;
        }
      }
      for (const [name, parts] of pieces) this.rows.columns.set(name, new latentmill.Column(name, parts, this.rows.length));
      this.detailsLoaded = true;
      this.#fillChoices();
      this.#buildFacets();
      this.update({ keep: true });
      announce("Files and digests can be filtered now");
    }
  }

  // Least and most of a column of numbers.
  function ends(column, body, state, change) {
    let [least, most] = [Infinity, -Infinity];
    for (const value of column.numbers) {
      if (value < least) least = value;
      if (value > most) most = value;
    }
    const field = (label, placeholder) => el("input", { type: "number", step: "any", placeholder: number(placeholder), aria: { label: `${label} ${column.name}` } });
    const [from, to] = [field("least", least), field("most", most)];
    const changed = () => {
      const filter = {};
      if (from.value !== "") filter.least = from.valueAsNumber;
      if (to.value !== "") filter.most = to.valueAsNumber;
      change(Object.keys(filter).length ? filter : null);
    };
    for (const input of [from, to]) input.addEventListener("input", changed);
    body.append(el("div.ends", {}, from, el("span.soft", {}, "to"), to));
    return () => {
      const filter = state.filters.get(column.name) ?? {};
      for (const [input, value] of [[from, filter.least], [to, filter.most]]) {
        if (document.activeElement !== input) input.value = value ?? "";
      }
    };
  }

  // A text that a column's texts contain.
  function words(column, body, state, change) {
    const input = el("input", { type: "text", placeholder: "contains …", aria: { label: `${column.name} contains` }, autocomplete: "off", spellcheck: false });
    input.addEventListener("input", () => change(input.value ? { contains: input.value } : null));
    body.append(input);
    return () => {
      if (document.activeElement !== input) input.value = state.filters.get(column.name)?.contains ?? "";
    };
  }

  const said = (value) => (value === null ? "(none)" : value === "" ? "(empty)" : typeof value === "number" ? number(value) : value);
  const brief = (value) => (typeof value === "number" && !Number.isInteger(value) ? number(Number(value.toPrecision(4))) : said(value));
  const isOnly = (filter, value) => filter?.any?.size === 1 && filter.any.has(value);

  function spoken(filter) {
    if (filter.any) return [...filter.any].map(said).join(", ").slice(0, 60);
    if (filter.contains !== undefined) return `contains ${filter.contains}`;
    if (filter.most === undefined) return `≥ ${number(filter.least)}`;
    return filter.least === undefined ? `≤ ${number(filter.most)}` : `${number(filter.least)} to ${number(filter.most)}`;
  }

  function fill(select, options, value) {
    select.replaceChildren(...options.map(([key, text]) => el("option", { value: key }, text.length > 80 ? `${text.slice(0, 79)}…` : text)));
    select.value = value;
  }

  function showFilters(open) {
    document.body.classList.toggle("filtering", open);
    byId("filter-button").setAttribute("aria-expanded", String(open));
    if (open) byId("filters").querySelector("summary, button")?.focus({ preventScroll: true });
    else byId("filter-button").focus({ preventScroll: true });
    dispatchEvent(new Event("resize"));
  }

  function readFilter({ any, contains, least, most }) {
    if (any) return { any: new Set(any) };
    if (contains !== undefined) return { contains: String(contains) };
    return { ...(least === undefined ? {} : { least: Number(least) }), ...(most === undefined ? {} : { most: Number(most) }) };
  }

  // The state in the address: a link shows what is shown now.
  function readState() {
    const state = { search: "", filters: new Map(), sort: "sample", descending: false };
    const told = new URLSearchParams(location.hash.slice(1));
    try {
      for (const [key, value] of told) {
        if (key === "q") state.search = value;
        else if (["sort", "x", "y", "z"].includes(key)) state[key] = value;
        else if (key === "down") state.descending = true;
        else if (key === "view") state.view = value === "matrix" ? "matrix" : "tiles";
        else if (key === "page") state.page = JSON.parse(value);
        else if (key === "size") state.size = Math.min(LARGEST, Math.max(SMALLEST, Number(value) || SMALLEST));
        else if (key === "filters") state.filters = new Map(JSON.parse(value).map(([name, filter]) => [String(name), readFilter(filter)]));
      }
    } catch {
      state.filters = new Map(); // a link that was cut
    }
    return state;
  }

  function writeState({ search, filters, sort, descending, view, x, y, z, page, size }) {
    const told = new URLSearchParams({ view, sort });
    if (size) told.set("size", String(size));
    if (search) told.set("q", search);
    if (descending) told.set("down", "1");
    for (const [key, value] of Object.entries({ x, y, z })) told.set(key, value ?? "");
    if (page !== undefined) told.set("page", JSON.stringify(page));
    if (filters.size) told.set("filters", JSON.stringify([...filters].map(([name, filter]) => [name, filter.any ? { any: [...filter.any] } : filter])));
    history.replaceState(null, "", `#${told}`);
  }

  function listen(gallery) {
    const { state } = gallery;
    let typing;
    byId("search").value = state.search;
    byId("search").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => gallery.set({ search: byId("search").value }), 120);
    });
    byId("sort").addEventListener("change", () => gallery.set({ sort: byId("sort").value }));
    byId("direction").addEventListener("click", () => gallery.set({ descending: !state.descending }));
    byId("size").addEventListener("input", () => gallery.set({ size: Number(byId("size").value) }, { keep: true }));
    byId("as-tiles").addEventListener("click", () => gallery.set({ view: "tiles" }));
    byId("as-matrix").addEventListener("click", () => gallery.set({ view: "matrix" }));
    for (const key of ["x", "y", "z"]) byId(`axis-${key}`).addEventListener("change", (event) => gallery.set({ [key]: event.target.value }));
    byId("page-before").addEventListener("click", () => gallery.turn(-1));
    byId("page-after").addEventListener("click", () => gallery.turn(1));
    byId("filter-button").addEventListener("click", () => showFilters(!document.body.classList.contains("filtering")));
    byId("help-button").addEventListener("click", () => byId("help").showModal());
    byId("help-close").addEventListener("click", () => byId("help").close());
    addEventListener("resize", () => gallery.update({ keep: true }));
    document.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || document.querySelector("dialog[open]")) return;
      if (event.key === "Escape" && document.body.classList.contains("filtering")) showFilters(false);
      if (event.target.closest("input, select, textarea")) return;
      const actions = {
        "/": () => byId("search").focus(),
        f: () => byId("filter-button").click(),
        g: () => byId(state.view === "matrix" ? "as-tiles" : "as-matrix").click(),
        "[": () => gallery.turn?.(-1),
        "]": () => gallery.turn?.(1),
        "?": () => byId("help").showModal(),
      };
      if (!(event.key in actions)) return;
      event.preventDefault();
      actions[event.key]();
    });
  }

  // While the job runs, the page asks for what is new.
  async function follow(gallery) {
    while (gallery.meta.live) {
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      if (document.hidden || byId("lightbox").open) continue; // rows have other places afterwards
      try {
        const meta = await load("data/meta.js", { fresh: true });
        if (meta.updated !== gallery.meta.updated) await gallery.read(meta, { keep: true });
      } catch {
        // it is written at this moment, or the network is away: the next time will tell
      }
    }
  }

  async function start() {
    themeButton(byId("theme"));
    if (innerWidth >= 1100) document.body.classList.add("filtering");
    byId("filter-button").setAttribute("aria-expanded", String(innerWidth >= 1100));
    let gallery;
    try {
      const meta = await load("data/meta.js", { fresh: true });
      gallery = new Gallery(meta);
      await gallery.read(meta);
    } catch (error) {
      byId("nothing").hidden = false;
      byId("nothing").replaceChildren(el("h2", {}, "This report cannot be read"), el("p", {}, `${error.message}. Write it again: latentmill report OUT`));
      throw error;
    }
    latentmill.gallery = gallery;
    listen(gallery);
    follow(gallery);
  }

  start();
}
