"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const safe = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const rows = new Map(data.rows.map((row) => [row.name, row]));
  const ran = data.rows.filter((row) => !row.refused && row.methods.length);
  const isControl = (row) => row.methods.length === 1 && row.methods[0].split(":")[0] === "fewer-steps";
  const columns = new Map(data.columns.map((column) => [column.key, column]));
  const PLAIN = data.rows[0].name;

  /* ---- theme ---- */
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const wear = (theme) => { root.dataset.theme = theme; };
  wear(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => wear(dark.matches ? "dark" : "light"));
  const flip = () => wear(root.dataset.theme === "dark" ? "light" : "dark");
  $("#theme").addEventListener("click", flip);

  /* ---- colours: one hue for each first method ---- */
  const firsts = [...new Set(ran.filter((r) => !isControl(r)).map((r) => r.methods[0].split(":")[0]))];
  const hue = new Map(firsts.map((name, i) => [name, Math.round((i * 360) / Math.max(firsts.length, 1) + 222) % 360]));
  const colour = (row) => {
    if (!row.methods.length || isControl(row)) return "var(--soft)";
    return `hsl(${hue.get(row.methods[0].split(":")[0]) ?? 0} 62% 56%)`;
  };

  /* ---- values ---- */
  const value = (row, key) => {
    if (key === "margin") return row.margins && row.margins.psnr != null ? row.margins.psnr : null;
    if (row.scores && row.scores[key]) return row.scores[key].value;
    return row[key] ?? null;
  };
  const digits = (key) => ({ speedup: 2, seconds: 0, share_saved: 0, psnr: 1, margin: 1, accuracy: 0, frechet: 1 })[key] ?? 3;
  const shown = (row, key) => {
    const found = value(row, key), column = columns.get(key);
    if (found !== null && found === column.equal) return "equal";
    return found == null ? "\u2013" : (found * column.scale).toFixed(digits(key)).replace(/^-(0(?:\.0*)?)$/, "$1") + column.unit;
  };
  const pixelated = (box) => {
    const first = data.strips[PLAIN] && data.strips[PLAIN][0];
    if (!first) return;
    const image = new Image();
    image.onload = () => { if (image.naturalWidth < 48) box.classList.add("pixels"); };
    image.src = first;
  };
  const thumbs = (name, count = 4) =>
    (data.strips[name] || []).slice(0, count).map((uri) => `<img alt="" src="${uri}">`).join("");
  $$(".card .thumbs").forEach((box) => {
    box.innerHTML = `<span>plain run</span>${thumbs(PLAIN)}<span>this one</span>${thumbs(box.parentElement.dataset.set)}`;
    pixelated(box);
  });

  /* ---- scatter ---- */
  const M = { left: 62, right: 20, top: 22, bottom: 50 };
  let W = 1000, H = 470;
  const axes = (which) => data.columns.filter((c) => c.axis === which && ran.some((row) => value(row, c.key) != null));
  const chosen = { x: $("#axis-x"), y: $("#axis-y") };
  for (const [which, select] of Object.entries(chosen)) {
    select.innerHTML = axes(which).map((c) => `<option value="${c.key}">${safe(c.title)}</option>`).join("");
    select.addEventListener("change", () => scatter());
  }
  const nice = (low, high, count = 6) => {
    const span = high - low || 1, raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= raw);
    const ticks = [];
    for (let t = Math.ceil(low / step) * step; t <= high + 1e-9; t += step) ticks.push(+t.toFixed(10));
    return ticks;
  };
  const domain = (points, at, higher) => {
    const values = points.map((p) => p[at]);
    let low = Math.min(...values), high = Math.max(...values);
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    low -= pad; high += pad;
    return higher ? [low, high] : [high, low];
  };
  function front(points, kx, ky) {
    const sx = kx.higher ? 1 : -1, sy = ky.higher ? 1 : -1;
    let best = -Infinity;
    return [...points].sort((a, b) => sx * (b.x - a.x) || sy * (b.y - a.y)).filter((p) => {
      if (sy * p.y <= best) return false;
      best = sy * p.y;
      return true;
    });
  }
  function scatter() {
    const kx = columns.get(chosen.x.value), ky = columns.get(chosen.y.value);
    if (!kx || !ky) { $("#scatter").innerHTML = '<p class="hint" style="padding:20px">Nothing could be plotted.</p>'; return; }
    W = Math.max(320, $("#scatter").clientWidth || 1000);
    H = Math.round(Math.max(340, Math.min(480, W * 0.8)));
    const cap = ky.key === "psnr" ? 99.5 : Infinity;
    const points = ran.map((row) => ({ row, x: value(row, kx.key), y: value(row, ky.key) }))
      .filter((p) => p.x != null && p.y != null);
    const open = points.filter((p) => p.y < cap);
    const top = open.length ? Math.max(...open.map((p) => p.y)) : 60;
    for (const p of points) { p.x *= kx.scale; p.drawn = (p.y >= cap ? top + 3 : p.y) * ky.scale; p.y *= ky.scale; }
    const [x0, x1] = domain(points, "x", kx.higher), [y0, y1] = domain(points, "drawn", ky.higher);
    const px = (v) => M.left + ((v - x0) / (x1 - x0)) * (W - M.left - M.right);
    const py = (v) => H - M.bottom - ((v - y0) / (y1 - y0)) * (H - M.top - M.bottom);
    const parts = [], beds = [];
    if (ky.key === "psnr") {
      data.tiers.forEach((tier, i) => {
        const above = i ? data.tiers[i - 1].floor : Infinity;
        const a = Math.max(M.top, py(Math.min(above, y1))), b = Math.min(H - M.bottom, py(Math.max(tier.floor, y0)));
        if (b - a < 14) return;
        if (i % 2 === 0) parts.push(`<rect class="tier" x="${M.left}" y="${a}" width="${W - M.left - M.right}" height="${b - a}"/>`);
        if (W < 600) return;
        const wide = tier.words.length * 6.6;
        beds.push({ x: W - M.right - 6 - wide, y: a + 3, w: wide, h: 15 });
        parts.push(`<text x="${W - M.right - 6}" y="${a + 15}" text-anchor="end" opacity=".75">${safe(tier.words)}</text>`);
      });
    }
    for (const t of nice(Math.min(x0, x1), Math.max(x0, x1), W < 600 ? 3 : 6)) {
      parts.push(`<line class="grid" x1="${px(t)}" x2="${px(t)}" y1="${M.top}" y2="${H - M.bottom}" opacity=".6"/>`);
      parts.push(`<text x="${px(t)}" y="${H - M.bottom + 20}" text-anchor="middle">${t}${safe(kx.unit)}</text>`);
    }
    for (const t of nice(Math.min(y0, y1), Math.max(y0, y1), 5)) {
      parts.push(`<line class="grid" x1="${M.left}" x2="${W - M.right}" y1="${py(t)}" y2="${py(t)}" opacity=".6"/>`);
      parts.push(`<text x="${M.left - 9}" y="${py(t) + 4}" text-anchor="end">${t}</text>`);
    }
    parts.push(`<text x="${(W + M.left) / 2}" y="${H - 8}" text-anchor="middle">${safe(kx.title)}</text>`);
    parts.push(`<text x="16" y="${H / 2}" text-anchor="middle" transform="rotate(-90 16 ${H / 2})">${safe(ky.title)}${safe(ky.unit && ` (${ky.unit.trim()})`)}</text>`);
    const control = points.filter((p) => isControl(p.row)).sort((a, b) => a.x - b.x);
    if (control.length > 1) parts.push(`<polyline class="steps" points="${control.map((p) => `${px(p.x)},${py(p.drawn)}`).join(" ")}"/>`);
    const best = front(points, kx, ky), onFront = new Set(best.map((p) => p.row.name));
    if (best.length > 1) parts.push(`<polyline class="front" points="${best.map((p) => `${px(p.x)},${py(p.drawn)}`).join(" ")}"/>`);
    const taken = points.map((p) => ({ x: px(p.x) - 7, y: py(p.drawn) - 7, w: 14, h: 14 })).concat(beds);
    const labels = [];
    const picked = new Set(Object.values(data.advice));
    const order = [...points].sort((a, b) => picked.has(b.row.name) - picked.has(a.row.name) || onFront.has(b.row.name) - onFront.has(a.row.name));
    for (const p of order) {
      if (isControl(p.row)) continue;
      const most = W < 600 ? 20 : 34, text = p.row.name.length > most ? p.row.name.slice(0, most - 1) + "\u2026" : p.row.name, w = text.length * 7.1, x = px(p.x), y = py(p.drawn);
      const spots = [[x + 11, y + 4, "start"], [x - 11, y + 4, "end"], [x, y - 13, "middle"], [x, y + 22, "middle"], [x + 9, y - 10, "start"], [x + 9, y + 18, "start"], [x - 9, y - 10, "end"], [x - 9, y + 18, "end"]];
      for (const [lx, ly, anchor] of spots) {
        const left = anchor === "start" ? lx : anchor === "end" ? lx - w : lx - w / 2;
        const box = { x: left, y: ly - 12, w, h: 16 };
        const hit = (o) => box.x < o.x + o.w && o.x < box.x + box.w && box.y < o.y + o.h && o.y < box.y + box.h;
        if (left < M.left || left + w > W - 4 || ly < M.top || ly > H - M.bottom || taken.some(hit)) continue;
        taken.push(box);
        labels.push(`<text class="${onFront.has(p.row.name) ? "label" : ""}" x="${lx}" y="${ly}" text-anchor="${anchor}">${safe(text)}</text>`);
        break;
      }
    }
    const drawn = [...points].sort((a, b) => isControl(b.row) - isControl(a.row) || onFront.has(a.row.name) - onFront.has(b.row.name));
    for (const p of drawn) {
      const ring = onFront.has(p.row.name) && !isControl(p.row) ? `<circle cx="${px(p.x)}" cy="${py(p.drawn)}" r="10.5" style="fill:none;stroke:var(--accent)"/>` : "";
      const said = `${p.row.name}: ${kx.title} ${shown(p.row, kx.key)}, ${ky.title} ${shown(p.row, ky.key)}`;
      parts.push(`<g class="point${isControl(p.row) ? " control" : ""}" tabindex="0" role="button" aria-label="${safe(said)}" data-set="${safe(p.row.name)}"><circle cx="${px(p.x)}" cy="${py(p.drawn)}" r="16" style="fill:transparent;stroke:none"/>${ring}<circle class="body" cx="${px(p.x)}" cy="${py(p.drawn)}" r="6.5" style="fill:${isControl(p.row) ? "var(--card)" : colour(p.row)}"/></g>`);
    }
    $("#scatter").innerHTML = `<svg viewBox="0 0 ${W} ${H}" role="group" aria-label="${safe(kx.title)} against ${safe(ky.title)}">${parts.join("")}${labels.join("")}</svg>`;
    $$("#scatter .point").forEach(wire);
  }
  const tip = $("#tip");
  function wire(point) {
    const name = point.dataset.set;
    const on = () => { tell(point, name); light(name, true); };
    const off = () => { tip.classList.remove("on"); light(name, false); };
    point.addEventListener("pointerenter", on);
    point.addEventListener("pointerleave", off);
    point.addEventListener("focus", on);
    point.addEventListener("blur", off);
    point.addEventListener("click", () => open(name));
    point.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(name); }
      if (event.key === "Escape") off();
    });
  }
  function tell(point, name) {
    const row = rows.get(name), keys = ["speedup", "share_saved", "psnr", "ssim", "lpips", "accuracy", "margin"];
    const lines = keys.filter((key) => value(row, key) != null).map((key) => {
      const sign = key === "margin" && value(row, key) > 0 ? "+" : "";
      return `<tr><td>${safe(columns.get(key).title)}</td><td>${sign}${safe(shown(row, key))}</td></tr>`;
    });
    tip.innerHTML = `<b>${safe(name)}</b><table>${lines.join("")}</table><div class="thumbs">${thumbs(name)}</div>`;
    pixelated($(".thumbs", tip));
    const box = $(".canvas").getBoundingClientRect(), at = $(".body", point).getBoundingClientRect();
    const left = at.left - box.left, width = Math.min(272, box.width - 16);
    tip.style.left = `${Math.max(8, Math.min(left + 22 + width > box.width ? left - width - 14 : left + 22, box.width - width - 8))}px`;
    tip.style.top = `${Math.max(8, Math.min(at.top - box.top - 30, box.height - tip.offsetHeight - 8))}px`;
    tip.classList.add("on");
  }
  const light = (name, on) => $$("[data-set]").forEach((e) => { if (e.dataset.set === name && !e.closest(".card")) e.classList.toggle("lit", on); });
  const open = (name) => {
    const card = $$("#sets .set").find((e) => e.dataset.set === name);
    if (!card) return;
    card.scrollIntoView({ block: "center" });
    card.focus({ preventScroll: true });
  };
  $("#keys").innerHTML = firsts.map((name) => `<li><i style="--c:hsl(${hue.get(name)} 62% 56%)"></i>${safe(name)}</li>`).join("")
    + (ran.some(isControl) ? '<li><i class="hollow"></i>fewer steps</li>' : "");

  /* ---- table ---- */
  const body = $("#table tbody"), heads = $$("#table thead th");
  const front0 = new Set(data.front.psnr || []);
  const fastest = Math.max(1, ...ran.map((row) => row.speedup));
  $$("tr", body).forEach((line) => {
    const row = rows.get(line.dataset.set);
    $(".dot", line).style.setProperty("--c", colour(row));
    line.classList.toggle("front", front0.has(row.name));
    if (front0.has(row.name)) $(".dot", line).title = "on the front";
    const place = heads.findIndex((h) => $("button", h).dataset.key === "speedup");
    const cell = row.refused ? null : line.children[place];
    if (cell) {
      cell.classList.add("meter");
      cell.style.setProperty("--w", `${Math.max(0, ((row.speedup - 1) / (fastest - 1 || 1)) * 100)}%`);
      cell.title = `${row.speedup_range[0].toFixed(2)} to ${row.speedup_range[1].toFixed(2)} in ${row.times.length} turns`;
    }
    $("a", line).addEventListener("click", (event) => { event.preventDefault(); open(row.name); });
    line.addEventListener("pointerenter", () => light(row.name, true));
    line.addEventListener("pointerleave", () => light(row.name, false));
  });
  let order = { key: "", down: true };
  function sort(key, down) {
    order = { key, down };
    const place = heads.findIndex((h) => $("button", h).dataset.key === key);
    heads.forEach((h, i) => (i === place ? h.setAttribute("aria-sort", down ? "descending" : "ascending") : h.removeAttribute("aria-sort")));
    const at = (line) => {
      if (key === "name") return line.dataset.set.toLowerCase();
      const cell = line.children[place];
      return cell && cell.dataset.value !== undefined ? +cell.dataset.value : null;
    };
    const lines = $$("tr", body).map((line) => ({ line, v: at(line) }));
    lines.sort((a, b) => {
      if (a.v === null || b.v === null) return (a.v === null) - (b.v === null);
      const by = a.v < b.v ? -1 : a.v > b.v ? 1 : 0;
      return down ? -by : by;
    });
    lines.forEach(({ line }) => body.append(line));
    arrange(lines.map(({ line }) => line.dataset.set));
  }
  heads.forEach((head) => {
    const key = $("button", head).dataset.key, column = columns.get(key);
    $("button", head).addEventListener("click", () => sort(key, order.key === key ? !order.down : key !== "name" && column.higher));
  });
  $("#controls").addEventListener("change", (event) => {
    $$(".control").forEach((e) => { if (e.matches("tr, .set")) e.hidden = !event.target.checked; });
  });

  /* ---- pictures and maps ---- */
  const gallery = $("#gallery"), sets = $("#sets");
  let mode = "picture", hold = null;
  const images = new Map();
  const image = (uri) => {
    if (!images.has(uri)) images.set(uri, new Promise((done) => { const i = new Image(); i.onload = () => done(i); i.src = uri; }));
    return images.get(uri);
  };
  async function paint(canvas) {
    const place = +canvas.dataset.place, name = canvas.dataset.name;
    const [plain, own] = await Promise.all([image(data.strips[PLAIN][place]), image(data.strips[name][place])]);
    const w = own.naturalWidth, h = own.naturalHeight, pen = canvas.getContext("2d", { willReadFrequently: true });
    if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; canvas.style.aspectRatio = `${w} / ${h}`; }
    const now = hold === "all" || hold === canvas ? "plain" : mode;
    pen.drawImage(now === "plain" || now === "wipe" ? plain : own, 0, 0);
    if (now === "wipe") {
      const from = Math.round(w * (1 - $("#wipe").value / 100));
      if (from < w) pen.drawImage(own, from, 0, w - from, h, from, 0, w - from, h);
      if (from > 0 && from < w) { pen.fillStyle = "#fff"; pen.fillRect(from, 0, 1, h); }
    }
    if (now === "difference") {
      const a = pen.getImageData(0, 0, w, h);
      pen.drawImage(plain, 0, 0);
      const b = pen.getImageData(0, 0, w, h);
      for (let i = 0; i < a.data.length; i += 4) for (let c = 0; c < 3; c++) a.data[i + c] = Math.min(255, 4 * Math.abs(a.data[i + c] - b.data[i + c]));
      pen.putImageData(a, 0, 0);
    }
  }
  const visible = new Set();
  const watch = new IntersectionObserver((entries) => entries.forEach((entry) => {
    visible[entry.isIntersecting ? "add" : "delete"](entry.target);
    if (entry.isIntersecting) $$("canvas", entry.target).forEach(paint);
  }), { rootMargin: "200px" });
  const repaint = () => visible.forEach((card) => $$("canvas", card).forEach(paint));
  $$('input[name="mode"]').forEach((input) => input.addEventListener("change", () => {
    mode = input.value;
    gallery.classList.toggle("wiping", mode === "wipe");
    repaint();
  }));
  $("#wipe").addEventListener("input", repaint);
  $("#size").addEventListener("input", (event) => sets.style.setProperty("--pic", `${event.target.value}px`));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input:not([type=radio]):not([type=range]):not([type=checkbox])") || event.ctrlKey || event.metaKey) return;
    if (event.key === "p" && hold === null) { hold = "all"; repaint(); }
    if (event.key === "t") flip();
  });
  document.addEventListener("keyup", (event) => { if (event.key === "p") { hold = null; repaint(); } });

  const KIND = { r: "reused", p: "predicted", w: "partly computed", x: "left out" };
  function map(row) {
    const heat = row.heat, steps = heat.shares.length, blocks = steps ? heat.shares[0].length : 0;
    if (!steps) return "";
    const gates = Object.entries(heat.branches).filter(([, letters]) => /[^.]/.test(letters));
    const cell = 300 / steps, tall = Math.max(3, Math.min(14, 110 / Math.max(blocks, 1))), gap = steps > 60 ? 0 : 0.8, left = 34;
    const parts = [];
    let y = 0;
    const lane = (letters, shares, height, label, told) => {
      if (label) parts.push(`<text x="${left - 5}" y="${y + height / 2 + 3}" text-anchor="end">${safe(label)}</text>`);
      for (let s = 0; s < letters.length; s++) {
        const kind = letters[s], x = left + s * cell, share = shares ? shares[s] : kind === "." ? 0 : 1;
        parts.push(`<rect class="bed" x="${x}" y="${y}" width="${cell - gap}" height="${height - 0.8}"/>`);
        if (share > 0) parts.push(`<rect class="${kind === "." ? "r" : kind}" opacity="${(0.3 + 0.7 * share).toFixed(2)}" x="${x}" y="${y}" width="${cell - gap}" height="${height - 0.8}"><title>${safe(`step ${s + 1} of ${letters.length}, ${told}: ${KIND[kind] || "saved"}${shares ? `, ${Math.round(share * 100)} % of its arithmetic saved` : ""}`)}</title></rect>`);
      }
      y += height;
    };
    for (const [name, letters] of gates) lane(letters, null, Math.max(tall, 9), name, `guidance branch ${name}`);
    if (gates.length) y += 4;
    for (let b = 0; b < blocks; b++) {
      const label = b === 0 || b === blocks - 1 ? (b === 0 ? "first" : "last") : "";
      lane(heat.kinds.map((k) => k[b]).join(""), heat.shares.map((s) => s[b]), tall, label, `block ${b + 1} of ${blocks}`);
    }
    parts.push(`<text x="${left}" y="${y + 11}">noise</text><text x="${left + 300}" y="${y + 11}" text-anchor="end">picture, step ${steps}</text>`);
    const saved = `${Math.round(row.share_reused * 100)} % of the map was not computed`;
    return `<div class="map"><svg viewBox="0 0 ${left + 301} ${y + 15}" role="img" aria-label="${safe(saved)}">${parts.join("")}</svg></div>`;
  }
  const figures = (row) => {
    if (!row.methods.length) return `${shown(row, "seconds")} a picture`;
    const keys = ["psnr", "lpips", "accuracy"].filter((key) => value(row, key) != null);
    return `<b>${shown(row, "speedup")}</b> as fast &middot; ${shown(row, "share_saved")} of the arithmetic saved &middot; ${keys.map((key) => `${columns.get(key).title} <b>${shown(row, key)}</b>`).join(" &middot; ")}`;
  };
  for (const row of data.rows) {
    if (row.refused) continue;
    const card = document.createElement("article");
    card.className = `set${isControl(row) ? " control" : ""}`;
    card.dataset.set = row.name;
    card.tabIndex = -1;
    const strip = (data.strips[row.name] || []).map((_, place) => `<canvas data-place="${place}" data-name="${safe(row.name)}" role="img" aria-label="${safe(`${data.shown[place]}, by ${row.name}`)}" title="${safe(data.shown[place])}"></canvas>`).join("");
    const command = row.methods.length ? `<button class="copy" type="button" title="copy"><code>ditloom generate ${safe(row.flags)}</code></button>` : "";
    const notes = row.notes.map((note) => `<span class="note">${safe(note)}</span>`).join("");
    card.innerHTML = `<header><h3><i class="dot" style="--c:${colour(row)}"></i>${safe(row.name)} <span class="figures">${figures(row)}</span></h3><p>${safe(data.explained[row.name])}</p></header><div class="strip">${strip}</div>${map(row)}<div class="more">${command}${notes}</div>`;
    pixelated($(".strip", card));
    $$("canvas", card).forEach((canvas) => {
      const down = () => { hold = canvas; paint(canvas); };
      const up = () => { if (hold === canvas) { hold = null; paint(canvas); } };
      canvas.addEventListener("pointerdown", down);
      for (const end of ["pointerup", "pointerleave", "pointercancel"]) canvas.addEventListener(end, up);
    });
    sets.append(card);
    watch.observe(card);
  }
  function arrange(names) {
    const place = new Map(names.map((name, i) => [name, i]));
    const cards = [...sets.children].sort((a, b) => (b.dataset.set === PLAIN) - (a.dataset.set === PLAIN) || place.get(a.dataset.set) - place.get(b.dataset.set));
    cards.forEach((card) => sets.append(card));
  }

  /* ---- copying ---- */
  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".copy");
    if (!button) return;
    try { await navigator.clipboard.writeText(button.textContent.trim()); } catch { return; }
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1500);
  });

  if (data.busy) chosen.x.value = "share_saved";
  scatter();
  let last = W;
  new ResizeObserver(() => {
    if (Math.abs($("#scatter").clientWidth - last) < 2) return;
    last = $("#scatter").clientWidth;
    scatter();
  }).observe($("#scatter"));
  sort(data.busy ? "share_saved" : "speedup", true);
})();
