"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const style = getComputedStyle(document.documentElement);
  document.documentElement.classList.add("js");

  // --- numbers -------------------------------------------------------------------------------------------------------

  const formatted = (value, decimals, signed = false) => {
    if (value === null || value === undefined) return "–";
    let text = value.toFixed(decimals);
    if (Number(text) === 0) text = text.replace("-", "");
    else if (signed && value > 0) text = `+${text}`;
    return text.replace("-", "−");
  };

  const element = (name, text = "", attributes = {}) => {
    const made = document.createElement(name);
    made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  const numberCell = (value, decimals, signed = false) => {
    const cell = element("td", formatted(value, decimals, signed), { class: "figure" });
    if (value === null || value === undefined) {
      cell.title = "not available";
      cell.classList.add("none");
    }
    return cell;
  };

  const badge = (index) => {
    const made = element("span", data.models[index].letter, { class: "badge" });
    made.style.setProperty("--colour", `var(--model-${index % 7})`);
    return made;
  };

  // --- the metric that summary, charts and tables show ---------------------------------------------------------------

  const metricChoice = byId("metric");
  const metric = () => data.metrics[metricChoice.selectedIndex];
  const showMetric = () => {
    for (const part of document.querySelectorAll("[data-metric]")) {
      part.hidden = part.dataset.metric !== metric().key;
    }
  };

  // --- all cases -----------------------------------------------------------------------------------------------------

  const volumes = Array.from(document.querySelectorAll("script.volumes"));
  // The texts are large: only their beginnings are looked at until a case is shown.
  const packed = new Map();
  const volume = (place) => {
    if (!packed.has(place)) packed.set(place, JSON.parse(volumes[place].textContent));
    return packed.get(place);
  };
  const shownCase = byId("shown-case");
  const places = new Map(shownCase ? Array.from(shownCase.options, (option, place) => [option.textContent, place]) : []);

  const table = byId("case-table");
  const caseRegion = byId("case-region");
  const search = byId("case-search");
  const sorting = { column: null, descending: false };

  const columns = () => {
    const shown = metric();
    const region = caseRegion.value;
    const of = (model) => data.scores[shown.key][region][model.key];
    const made = [{ heading: "Case", text: true, value: (row) => data.cases[row].id }];
    if (data.cases.some((entry) => entry.fold !== null && entry.fold !== undefined)) {
      made.push({ heading: "Fold", decimals: 0, value: (row) => data.cases[row].fold ?? null });
    }
    data.models.forEach((model, index) => {
      made.push({ heading: model.name, badge: index, decimals: shown.decimals, value: (row) => of(model)[row] });
    });
    const baseline = data.models.find((model) => model.baseline);
    if (shown.better) {
      const size = shown.better === "zero" ? Math.abs : (value) => value;
      for (const model of data.models) {
        if (model === baseline) continue;
        made.push({
          heading: `${model.letter} − ${baseline.letter}`,
          decimals: shown.decimals,
          signed: true,
          value: (row) => {
            const pair = [of(model)[row], of(baseline)[row]];
            return pair.includes(null) ? null : size(pair[0]) - size(pair[1]);
          },
        });
      }
    }
    return made;
  };

  const compare = (column) => (first, second) => {
    const [a, b] = [column.value(first), column.value(second)];
    if (a === null || b === null) return (a === null) - (b === null) || first - second;
    const order = column.text ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return (sorting.descending ? -order : order) || first - second;
  };

  const fillTable = () => {
    const shown = columns();
    if (sorting.column !== null && sorting.column >= shown.length) sorting.column = null;
    const wanted = search.value.trim().toLowerCase();
    let rows = data.cases.map((_, row) => row).filter((row) => data.cases[row].id.toLowerCase().includes(wanted));
    if (sorting.column !== null) rows.sort(compare(shown[sorting.column]));
    table.caption.textContent = `${metric().name}, ${caseRegion.selectedOptions[0].textContent}`;
    byId("case-count").textContent = `${rows.length} of ${data.cases.length} cases`;

    const head = element("tr");
    shown.forEach((column, place) => {
      const cell = element("th", "", { scope: "col", "aria-sort": "none", ...(place && { class: "figure" }) });
      if (place === sorting.column) cell.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
      const button = element("button", "", { type: "button", "data-column": place });
      if (column.badge !== undefined) button.append(badge(column.badge), " ");
      // names of many models would make the table wider than a screen; the legend has them by letter
      const heading = column.badge !== undefined && data.models.length > 3 ? "" : column.heading;
      button.append(element("span", heading, { class: "heading" }));
      button.title = column.heading;
      button.addEventListener("click", () => {
        sorting.descending = sorting.column === place && !sorting.descending;
        sorting.column = place;
        fillTable();
        table.tHead.querySelector(`[data-column="${place}"]`).focus();
      });
      cell.append(button);
      head.append(cell);
    });
    table.tHead.replaceChildren(head);

    const body = rows.map((row) => {
      const line = element("tr");
      shown.forEach((column, place) => {
        if (place) {
          line.append(numberCell(column.value(row), column.decimals, column.signed));
          return;
        }
        const cell = element("th", "", { scope: "row" });
        const id = data.cases[row].id;
        if (places.has(id)) {
          const button = element("button", id, { type: "button", "aria-label": `Show pictures of ${id}` });
          button.addEventListener("click", () => jumpTo(id));
          cell.append(button);
        } else {
          cell.append(id);
        }
        line.append(cell);
      });
      return line;
    });
    table.tBodies[0].replaceChildren(...body);
  };

  // --- pictures ------------------------------------------------------------------------------------------------------

  const canvas = byId("canvas");
  const DASHES = [[7, 4], [2, 3], [11, 3, 2, 3], [5, 2], [2, 2, 6, 2], [13, 5], [3, 6]];
  const slider = byId("slice");
  const view = { place: 0, current: null, pictures: new Map(), turn: 0 };

  const picture = (source) => {
    if (!view.pictures.has(source)) {
      const made = new Image();
      made.src = source;
      view.pictures.set(source, made.decode().then(() => made));
    }
    return view.pictures.get(source);
  };

  const cell = (position) => {
    const [rows, width] = view.current.size;
    const across = view.current.columns;
    return [(position % across) * width, Math.floor(position / across) * rows, width, rows];
  };

  // One byte per voxel: which regions it belongs to. The bits distinguish regions that are outlined together.
  const bits = (sheets, position, chosen) => {
    const [left, top, width, rows] = cell(position);
    const small = document.createElement("canvas");
    small.width = width;
    small.height = rows;
    const context = small.getContext("2d", { willReadFrequently: true });
    const found = new Uint8Array(width * rows);
    sheets.forEach((sheet, plane) => {
      const mask = chosen === null ? 255 : chosen >> 3 === plane ? 1 << (chosen & 7) : 0;
      if (!mask) return;
      context.drawImage(sheet, left, top, width, rows, 0, 0, width, rows);
      const pixels = context.getImageData(0, 0, width, rows).data;
      for (let voxel = 0; voxel < found.length; voxel += 1) found[voxel] |= pixels[4 * voxel] & mask;
    });
    return found;
  };

  // Closed paths around a mask along the edges of its voxels, with the inside on the right.
  const border = (mask, width, rows) => {
    const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < rows && mask[y * width + x] !== 0;
    const edges = new Map();
    const add = (x0, y0, x1, y1) => {
      const start = y0 * (width + 1) + x0;
      if (!edges.has(start)) edges.set(start, []);
      edges.get(start).push(y1 * (width + 1) + x1);
    };
    for (let y = 0; y < rows; y += 1) {
      for (let x = 0; x < width; x += 1) {
        if (!inside(x, y)) continue;
        if (!inside(x, y - 1)) add(x, y, x + 1, y);
        if (!inside(x, y + 1)) add(x + 1, y + 1, x, y + 1);
        if (!inside(x - 1, y)) add(x, y + 1, x, y);
        if (!inside(x + 1, y)) add(x + 1, y, x + 1, y + 1);
      }
    }
    const paths = [];
    for (const first of edges.keys()) {
      while (edges.get(first).length) {
        const path = [first];
        let corner = first;
        do {
          corner = edges.get(corner).pop();
          path.push(corner);
        } while (corner !== first);
        paths.push(path.map((at) => [at % (width + 1), Math.floor(at / (width + 1))]));
      }
    }
    return paths;
  };

  const stroke = (context, paths, scale, colour, lineWidth, dash) => {
    const drawn = new Path2D();
    for (const path of paths) {
      path.forEach(([x, y], step) => drawn[step ? "lineTo" : "moveTo"](x * scale[0], y * scale[1]));
      drawn.closePath();
    }
    context.lineJoin = "round";
    context.setLineDash([]);
    context.strokeStyle = "rgb(0 0 0 / 65%)";
    context.lineWidth = lineWidth * 1.9;
    if (!dash.length) context.stroke(drawn);
    context.setLineDash(dash);
    context.strokeStyle = colour;
    context.lineWidth = lineWidth;
    context.stroke(drawn);
  };

  const colourOf = (key) => {
    const index = data.models.findIndex((model) => model.key === key);
    const name = key === "reference" ? "--image-reference" : `--image-model-${index % 7}`;
    return style.getPropertyValue(name).trim();
  };

  const tint = (context, mask, width, rows, colour) => {
    const layer = document.createElement("canvas");
    layer.width = width;
    layer.height = rows;
    const [red, green, blue] = colour.slice(1).match(/../g).map((part) => parseInt(part, 16));
    const pixels = new ImageData(width, rows);
    mask.forEach((value, voxel) => {
      if (value) pixels.data.set([red, green, blue, 170], 4 * voxel);
    });
    layer.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(layer, 0, 0, canvas.width, canvas.height);
  };

  const chosenRegion = () => (byId("outlined").value === "" ? null : Number(byId("outlined").value));

  const outlinesShown = () =>
    Array.from(document.querySelectorAll("[data-outline]"))
      .filter((box) => box.checked && !box.disabled)
      .map((box) => (box.dataset.outline === "reference" ? "reference" : data.models[Number(box.dataset.outline)].key));

  const draw = async () => {
    const turn = (view.turn += 1);
    const shown = view.current;
    const position = Number(slider.value);
    const index = shown.slices[position];
    slider.setAttribute("aria-valuetext", `slice ${index} of 0 to ${shown.depth - 1}`);
    byId("slice-text").textContent = `${index} of 0–${shown.depth - 1}`;

    const [rows, width] = shown.size;
    const keys = outlinesShown();
    const residual = byId("residual").value;
    const [image, tinted, ...outlined] = await Promise.all([
      picture(shown.channels[byId("channel").selectedIndex].picture),
      Promise.all((residual && shown.residuals[residual] ? shown.residuals[residual] : []).map(picture)),
      ...keys.map((key) => Promise.all(shown.labels[key].map(picture))),
    ]);
    // A later call has begun meanwhile: what it draws is what is wanted.
    if (turn !== view.turn) return;

    const high = rows * shown.spacing[0];
    const wide = width * shown.spacing[1];
    const room = Math.min(canvas.parentElement.clientWidth, 720, (0.75 * window.innerHeight * wide) / high);
    const dots = Math.min(window.devicePixelRatio || 1, 2);
    canvas.style.width = `${room}px`;
    canvas.width = Math.round(room * dots);
    canvas.height = Math.round((room * dots * high) / wide);
    const scale = [canvas.width / width, canvas.height / rows];
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, ...cell(position), 0, 0, canvas.width, canvas.height);
    if (tinted.length) tint(context, bits(tinted, position, chosenRegion()), width, rows, colourOf(residual));
    keys.forEach((key, order) => {
      const mask = bits(outlined[order], position, chosenRegion());
      const place = data.models.findIndex((model) => model.key === key);
      const dash = place < 0 ? [] : DASHES[place % DASHES.length].map((length) => length * dots);
      stroke(context, border(mask, width, rows), scale, colourOf(key), (place < 0 ? 2.2 : 1.9) * dots, dash);
    });
    const names = keys.map((key) => data.models.find((model) => model.key === key)?.name ?? "reference");
    canvas.setAttribute("aria-label",
      `${shown.id}, slice ${index}, ${byId("channel").value}; outlines: ${names.join(", ") || "none"}`);
    canvas.dataset.drawn = turn;
  };

  const fillScores = () => {
    const scores = byId("case-scores");
    const row = data.cases.findIndex((entry) => entry.id === view.current.id);
    scores.caption.textContent = metric().name;
    const head = element("tr");
    head.append(element("th", "Region", { scope: "col" }));
    data.models.forEach((model, index) => {
      const heading = element("th", "", { scope: "col", class: "figure", title: model.name });
      heading.append(badge(index));
      head.append(heading);
    });
    scores.tHead.replaceChildren(head);
    scores.tBodies[0].replaceChildren(...data.regions.map((region) => {
      const line = element("tr");
      line.append(element("th", region.name, { scope: "row" }));
      for (const model of data.models) {
        line.append(numberCell(data.scores[metric().key][region.key][model.key][row], metric().decimals));
      }
      return line;
    }));
  };

  // Choices of names, the same one again if there is one of that name.
  const refill = (select, names, values) => {
    const before = select.selectedOptions[0]?.textContent;
    select.replaceChildren(...names.map((name, place) => element("option", name, { value: values[place] })));
    select.selectedIndex = Math.max(0, names.indexOf(before));
  };

  const showCase = (place) => {
    view.place = place;
    view.current = volume(place);
    view.pictures.clear();
    const shown = view.current;
    shownCase.selectedIndex = place;
    byId("previous-case").disabled = place === 0;
    byId("next-case").disabled = place === volumes.length - 1;
    byId("reason").textContent = data.reasons[shown.id] || "";
    const names = shown.channels.map((channel) => channel.name);
    refill(byId("channel"), names, names);
    const regions = shown.regions.map((name) => name.replaceAll("_", " "));
    refill(byId("outlined"), regions.length > 1 ? [...regions, "all of them"] : regions, [...regions.keys(), ""]);
    for (const box of document.querySelectorAll("[data-outline]")) {
      const key = box.dataset.outline === "reference" ? "reference" : data.models[Number(box.dataset.outline)].key;
      box.disabled = !(key in shown.labels);
      box.closest("label").hidden = box.disabled;
      const option = Array.from(byId("residual").options).find((choice) => choice.value === key);
      option.hidden = option.disabled = box.disabled;
    }
    if (byId("residual").selectedOptions[0].disabled) byId("residual").value = "";
    slider.max = shown.slices.length - 1;
    slider.value = shown.start;
    const [first, last] = [shown.slices[0], shown.slices.at(-1)];
    const every = last - first + 1 === shown.slices.length;
    const kept = every ? "all slices" : `${shown.slices.length} evenly spaced slices`;
    byId("slices").textContent =
      `This file has ${kept} from ${first} to ${last}; the volume has ${shown.depth} slices, counted from 0. ` +
      "Residuals are differences between neighbouring slices of the whole volume.";
    fillScores();
    draw();
  };

  const jumpTo = (id) => {
    showCase(places.get(id));
    byId("disagreements").scrollIntoView();
    slider.focus({ preventScroll: true });
  };

  if (canvas) {
    data.models.forEach((_, index) => {
      document.querySelector(`[data-dash="${index}"]`).style.strokeDasharray = DASHES[index % DASHES.length].join(" ");
    });
    // More outlines than these are too many to begin with.
    document.querySelectorAll(".outline [data-outline]").forEach((box, index) => { box.checked = index < 2; });
    shownCase.addEventListener("change", () => showCase(shownCase.selectedIndex));
    byId("previous-case").addEventListener("click", () => showCase(view.place - 1));
    byId("next-case").addEventListener("click", () => showCase(view.place + 1));
    byId("viewer").addEventListener("input", (event) => { if (event.target !== shownCase) draw(); });
    new ResizeObserver(() => { if (view.current) draw(); }).observe(canvas.parentElement);
    showCase(0);
  }

  metricChoice.addEventListener("change", () => {
    showMetric();
    fillTable();
    if (view.current) fillScores();
  });
  caseRegion.addEventListener("change", fillTable);
  search.addEventListener("input", fillTable);
  showMetric();
  fillTable();
})();
