// Puts the parts of the page together.

import { watchAccess } from "./access.js";
import { AdapterList, Catalogue } from "./adapters.js";
import { byId, setText } from "./elements.js";
import { Examples } from "./examples.js";
import { Matrix } from "./matrix.js";
import { watchMessages } from "./messages.js";
import { Mix } from "./mix.js";
import { poll } from "./poll.js";
import { Run } from "./run.js";
import { watchSnippets } from "./snippets.js";
import { Throughput } from "./throughput.js";
import { Weights } from "./weights.js";

const [catalogue, mix] = [new Catalogue(), new Mix()];
new AdapterList(catalogue, mix);
new Weights(catalogue, mix);
new Examples(catalogue, mix);
new Matrix(catalogue, mix);
catalogue.addEventListener("change", () => setText(byId("base-model"), catalogue.baseModel));
watchMessages();
watchSnippets(catalogue, mix);

const throughput = new Throughput();
const askMetrics = poll(() => throughput.refresh(), 2);
const askAdapters = poll(() => catalogue.refresh(), 5);
new Run(mix, askAdapters);
watchAccess(() => {
  askAdapters();
  askMetrics();
});
